"""One sample of a view as a position shows it: which caption, which square, which noise; or why it cannot be used."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.captions import token_columns
from pipeline.pixels import as_array, open_picture, square, square_place
from pipeline.shards import View

from .objective import noise_at, noises_at, rng

if TYPE_CHECKING:
    from .batches import BatchConfig


@dataclass(frozen=True, kw_only=True)
class BadSample:
    """A sample that could not be read; it keeps its slot with weight 0."""

    position: int
    key: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sample, read."""

    key: str
    picture: np.ndarray
    """Pixels or latents."""
    ids: np.ndarray
    beside_ids: np.ndarray
    sizes: tuple[float, ...]
    noise: np.ndarray
    """float32 (K, C, h, w), one for each timestep."""
    posterior_noise: np.ndarray | None
    reason: str | None


class SampleReader:
    """Reads samples by manifest row. Threads may share one."""

    def __init__(self, view: View, config: BatchConfig) -> None:
        self.view, self.config = view, config
        self._keys = view.manifest.column("key")
        pairs = view.info.tokenizers[config.tokenizer]["captions"]
        columns = self._columns(config.tokenizer)
        self._captions = [(columns[kind], weight) for kind, weight in pairs]
        self._beside = {}
        """For each column of tokens the second text encoder's of the same caption."""
        if config.beside:
            others = self._columns(config.beside)
            if set(others) != set(columns):
                raise ValueError(
                    f"view {view.info.view!r} holds {', '.join(columns)} captions as tokens {config.tokenizer!r} and "
                    f"{', '.join(others)} as {config.beside!r}: pretokenize the same kinds for both"
                )
            self._beside = {columns[kind]: others[kind] for kind in columns}
        known = ("width", "height", "original_width", "original_height", "crop_left", "crop_top")
        self._sizes = {name: view.manifest.column(name) for name in known if name in view.manifest.column_names}

    def read(self, position: int, row: int) -> Sample:
        """The sample of manifest row `row` as position `position` shows it. Never raises: what is wrong is its `reason`."""
        config = self.config
        seed, phase, shape = config.seed, config.phase, config.latent_shape
        ids, beside, reason = _ids(config.empty_ids), _ids(config.beside_empty_ids), None
        picture, corner = np.zeros(self._picture_shape, dtype=np.float32), self._corner(position)
        sizes: tuple[float, ...] = (config.resolution,) * 2 + (0, 0) + (config.resolution,) * 2
        try:
            sizes = self._sizes_of(row, corner)
            picture = self._picture(row, corner)
            if rng(seed, phase, position, "drop").random() >= config.caption_drop:
                column = self._caption(position, row)
                ids = _array(self.view.read(row, column))
                if config.beside:
                    beside = _array(self.view.read(row, self._beside[column]))
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        return Sample(
            key=self._keys[row].as_py(),
            picture=picture,
            ids=ids,
            beside_ids=beside,
            sizes=sizes,
            noise=noises_at(seed, phase, position, shape, config.timesteps_per_encoding),
            posterior_noise=noise_at(seed, phase, position, shape, "posterior") if config.drawn_latents else None,
            reason=reason,
        )

    def _corner(self, position: int) -> tuple[float, float]:
        """Where the square is cut out: fractions of what is left over."""
        if self.config.crop == "center":
            return 0.5, 0.5
        left, top = rng(self.config.seed, self.config.phase, position, "crop").random(2)
        return left, top

    def _sizes_of(self, row: int, corner: tuple[float, float]) -> tuple[float, ...]:
        """`Batch.sizes` of one sample. A view that does not tell how its pictures came tells them as they are."""
        side = self.config.resolution
        known = {name: column[row].as_py() for name, column in self._sizes.items()}
        packed = known["width"], known["height"]
        _, _, left, top = square_place(packed, side, corner)
        scale = side / min(packed)
        left, top = left + scale * (known.get("crop_left") or 0), top + scale * (known.get("crop_top") or 0)
        original = known.get("original_height") or packed[1], known.get("original_width") or packed[0]
        return *original, top, left, side, side

    @property
    def _picture_shape(self) -> tuple[int, int, int]:
        if self.config.latents == "off":
            return 3, self.config.resolution, self.config.resolution
        channels, height, width = self.config.latent_shape
        return channels * (2 if self.config.drawn_latents else 1), height, width

    def _picture(self, row: int, corner: tuple[float, float]) -> np.ndarray:
        """The sample's square as pixels in [-1, 1], or its latents: float32 of `_picture_shape`."""
        config = self.config
        if config.latents == "view":
            latents = _array(self.view.read(row, "latents")).astype(np.float32)
            if latents.shape != self._picture_shape:
                raise ValueError(f"its latents are {latents.shape}, not {self._picture_shape}")
            return latents
        return as_array(square(open_picture(self.view.read(row, "image")), config.resolution, corner))

    def _columns(self, tokenizer: str) -> dict[str, str]:
        """By kind of caption the column of its tokens."""
        kinds = [kind for kind, _ in self.view.info.tokenizers[tokenizer]["captions"]]
        return dict(zip(kinds, token_columns(tokenizer, kinds), strict=True))

    def _caption(self, position: int, row: int) -> str:
        """The column of the kind of caption that the sample is shown with: one of those it has, by their weights."""
        there = [(c, weight) for c, weight in self._captions if self.view.place(row, c)]
        if not there:
            raise ValueError("it has no caption")
        if len(there) == 1:
            return there[0][0]
        edges = np.cumsum([weight for _, weight in there])
        drawn = rng(self.config.seed, self.config.phase, position, "caption").random() * edges[-1]
        return there[int(np.searchsorted(edges, drawn, side="right"))][0]


def _ids(ids: tuple[int, ...]) -> np.ndarray:
    return np.asarray(ids, dtype=np.int32)


def _array(data: bytes) -> np.ndarray:
    return np.load(io.BytesIO(data), allow_pickle=False)
