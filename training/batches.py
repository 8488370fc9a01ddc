"""The samples of a phase, in an order that is a pure function of (seed, manifest, position).

Position p is sample p mod N of epoch p div N, in a keyed permutation of the manifest. Global batch t is the positions
[tB, (t + 1)B), of which rank r of W takes a contiguous slice in micro-batches. So the state of the data is one integer,
batches straddle epochs, and nothing is padded, repeated or lost whatever the number of processes.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from pipeline.captions import token_columns
from pipeline.pixels import as_array, open_picture, square, square_place
from pipeline.shards import View

from .configuration import TimestepConfig
from .objective import noise_at, rng, timesteps_at
from .order import rows_at


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Everything that decides what the sample at a position looks like, and how positions are dealt out."""

    seed: int
    """Of the run."""
    phase: int
    """Number of the phase in the run, from 0."""
    resolution: int
    """Side of the square images, pixels."""
    batch: int
    """Global batch, samples."""
    micro_batch: int
    """Samples in one forward pass of one process."""
    latent_shape: tuple[int, int, int]
    """(channels, height, width) of the noise."""
    steps: int
    """T, the noise levels of the denoiser."""
    tokenizer: str
    """The view's name of the tokens."""
    empty_ids: tuple[int, ...]
    """Token ids of the empty prompt, which a dropped caption becomes."""
    beside: str | None = None
    """The view's name of the tokens of a second text encoder, of the same captions; None where there is none."""
    beside_empty_ids: tuple[int, ...] = ()
    """Token ids of the empty prompt for it."""
    caption_drop: float = 0.1
    """Share of the captions that is dropped, for classifier-free guidance."""
    crop: Literal["center", "random"] = "center"
    """Which square of an image that is not square."""
    drawn_latents: bool = False
    """Whether the VAE needs noise for its posterior."""
    latents: Literal["off", "view"] = "off"
    """Whether samples are pixels, or the latents that the view holds of them."""
    timesteps: TimestepConfig = field(default_factory=TimestepConfig)
    """How timesteps are drawn."""
    rank: int = 0
    """This process."""
    world: int = 1
    """All processes."""
    threads: int = 2
    """Threads that read and decode."""
    ahead: int = 3
    """Micro-batches that are read ahead."""

    def __post_init__(self) -> None:
        if self.batch % (self.world * self.micro_batch):
            raise ValueError(batch_problem(self.batch, self.world, self.micro_batch))


def batch_problem(batch: int, world: int, micro_batch: int) -> str:
    """What to say of a global batch that the processes cannot share."""
    found = f"a global batch of {batch} does not divide into {world} processes x micro-batches of {micro_batch}"
    if batch % world:
        return f"{found}: choose a number of processes that divides {batch}"
    return f"{found}: choose a micro_batch that divides {batch // world}"


@dataclass(frozen=True, kw_only=True)
class BadSample:
    """A sample that could not be read; it keeps its slot with weight 0."""

    position: int
    key: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A micro-batch of B samples on the CPU."""

    positions: list[int]
    keys: list[str]
    pixels: torch.Tensor | None
    """float32 (B, 3, resolution, resolution) in [-1, 1]; None where there are latents."""
    latents: torch.Tensor | None
    """float32 (B, 2C, h, w): mean and deviation as the view holds them, unscaled; (B, C, h, w) of a VAE without posterior."""
    ids: list[np.ndarray]
    """Token ids (length,) each, uint16 or int32."""
    beside_ids: list[np.ndarray]
    """The same captions' token ids for the second text encoder; empty where there is none."""
    sizes: torch.Tensor
    """float32 (B, 6): height and width of the picture as it came, top and left of the crop, height and width wanted, pixels
    (Podell et al. 2023, arXiv 2307.01952, section 2.2)."""
    timesteps: torch.Tensor
    """int64 (B,)"""
    noise: torch.Tensor
    """float32 (B, C, h, w)"""
    posterior_noise: torch.Tensor | None
    """float32 (B, C, h, w) for a VAE with a posterior."""
    weights: torch.Tensor
    """float32 (B,): 1, or 0 for a bad sample."""
    bad: list[BadSample]


@dataclass(frozen=True, kw_only=True)
class _Sample:
    key: str
    picture: np.ndarray
    """Pixels or latents."""
    ids: np.ndarray
    beside_ids: np.ndarray
    sizes: tuple[float, ...]
    noise: np.ndarray
    posterior_noise: np.ndarray | None
    reason: str | None


def check_images(view: View, resolution: int) -> None:
    """Raises ValueError when a view has no samples, smaller images than `resolution`, or a damaged manifest."""
    if view.info.resolution < resolution:
        raise ValueError(
            f"view {view.info.view!r} holds images of {view.info.resolution} px, the phase wants {resolution}: "
            "choose a view packed at that resolution"
        )
    if view.info.shape == "buckets":
        raise ValueError(
            f"view {view.info.view!r} holds pictures of many shapes, and training takes squares: pack it as `keep` or `square`"
        )
    if not len(view):
        raise ValueError(f"view {view.info.view!r} holds no samples: build it first, or loosen its condition")
    if len(view.manifest) != len(view):
        raise ValueError(
            f"view {view.info.view!r} tells of {len(view)} samples, its manifest of {len(view.manifest)}: pack again"
        )


class Batches:
    """Iterates over the micro-batches of this rank from a position on, without end; close it, or use `with`."""

    def __init__(self, view: View, config: BatchConfig, position: int = 0) -> None:
        if position % config.batch:
            raise ValueError(f"position {position} is not at the edge of a global batch of {config.batch}")
        check_images(view, config.resolution)
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
        self._starts = _slices(config, position)
        self._pool = ThreadPoolExecutor(config.threads, thread_name_prefix="samples")
        self._waiting: deque[tuple[range, np.ndarray, list[Future[_Sample]]]] = deque()

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops reading ahead and waits for the threads."""
        self._waiting.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        while len(self._waiting) <= self.config.ahead:
            self._read_ahead()
        positions, timesteps, futures = self._waiting.popleft()
        samples = [future.result() for future in futures]
        posterior = [s.posterior_noise for s in samples if s.posterior_noise is not None]
        pictures = torch.from_numpy(np.stack([s.picture for s in samples]))
        bad = [
            BadSample(position=p, key=s.key, reason=s.reason)
            for p, s in zip(positions, samples, strict=True)
            if s.reason is not None
        ]
        return Batch(
            positions=list(positions),
            keys=[s.key for s in samples],
            pixels=pictures if self.config.latents == "off" else None,
            latents=pictures if self.config.latents == "view" else None,
            ids=[s.ids for s in samples],
            beside_ids=[s.beside_ids for s in samples] if self.config.beside else [],
            sizes=torch.tensor([s.sizes for s in samples], dtype=torch.float32),
            timesteps=torch.from_numpy(timesteps),
            noise=torch.from_numpy(np.stack([s.noise for s in samples])),
            posterior_noise=torch.from_numpy(np.stack(posterior)) if posterior else None,
            weights=torch.tensor([float(s.reason is None) for s in samples]),
            bad=bad,
        )

    def _read_ahead(self) -> None:
        config = self.config
        positions = next(self._starts)
        start = positions.start - positions.start % config.batch
        timesteps = timesteps_at(config.timesteps, config.seed, config.phase, start, config.batch, config.steps)
        rows = rows_at(config.seed, config.phase, self.view.info.manifest_sha256, np.asarray(positions), len(self.view))
        futures = [self._pool.submit(self._sample, p, int(row)) for p, row in zip(positions, rows, strict=True)]
        self._waiting.append((positions, timesteps[positions.start - start : positions.stop - start], futures))

    def _sample(self, position: int, row: int) -> _Sample:
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
        return _Sample(
            key=self._keys[row].as_py(),
            picture=picture,
            ids=ids,
            beside_ids=beside,
            sizes=sizes,
            noise=noise_at(seed, phase, position, shape),
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


def _slices(config: BatchConfig, position: int) -> Iterator[range]:
    """The positions of this rank's micro-batches."""
    share = config.batch // config.world
    while True:
        start = position + config.rank * share
        for first in range(start, start + share, config.micro_batch):
            yield range(first, first + config.micro_batch)
        position += config.batch
