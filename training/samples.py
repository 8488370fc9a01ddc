"""One sample of a view as a position shows it: which caption, which square, which noise; or why it cannot be used."""

from __future__ import annotations

import json
import re
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from pipeline.captions import token_columns
from pipeline.pixels import as_array, cover, cover_place, open_picture
from pipeline.shards import View

from .flips import may_flip
from .objective import noise_at, noises_at, rng
from .shard_cache import Shards
from .view_order import BUCKET, BUCKETS, shape_of

if TYPE_CHECKING:
    from .batches import BatchConfig

_NPY_HEADER = re.compile(
    rb"\{'descr': '(?P<type>[<>|][a-z]\d+)', 'fortran_order': False, 'shape': \((?P<shape>[\d, ]*)\), \}\s*"
)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sample, read."""

    key: str
    shard: str
    """Where its picture, or its latents, lie."""
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

    def __init__(self, view: View, config: BatchConfig, shards: Shards) -> None:
        self.view, self.config, self._shards = view, config, shards
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
        self._buckets = view.manifest.column(BUCKET) if view.info.shape == BUCKETS else None
        known = ("width", "height", "original_width", "original_height", "crop_left", "crop_top")
        self._crcs = {
            name.removesuffix("_crc32"): view.manifest.column(name)
            for name in view.manifest.column_names
            if name.endswith("_crc32")
        }
        self._sizes = {name: view.manifest.column(name) for name in known if name in view.manifest.column_names}

    def read(self, position: int, row: int) -> Sample:
        """The sample of manifest row `row` as position `position` shows it. Never raises: what is wrong is its `reason`."""
        config = self.config
        height, width = self._shape(row)
        seed, phase, shape = config.seed, config.phase, config.latent_shape_of(height, width)
        ids, beside, reason = _ids(config.empty_ids), _ids(config.beside_empty_ids), None
        picture, corner = np.zeros(self._picture_shape(row), dtype=np.float32), self._corner(position)
        sizes: tuple[float, ...] = height, width, 0, 0, height, width
        try:
            facts = self._mirrored(position, row)
            sizes = self._sizes_of(row, corner, facts)
            picture = self._picture(row, corner, flip=facts is not None)
            if rng(seed, phase, position, "drop").random() >= config.caption_drop:
                column = self._caption(position, row)
                ids = read_npy(self._member(row, column))
                if config.beside:
                    beside = read_npy(self._member(row, self._beside[column]))
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        return Sample(
            key=self._keys[row].as_py(),
            shard=self._shard(row),
            picture=picture,
            ids=ids,
            beside_ids=beside,
            sizes=sizes,
            noise=noises_at(seed, phase, position, shape, config.timesteps_per_encoding),
            posterior_noise=noise_at(seed, phase, position, shape, "posterior") if config.drawn_latents else None,
            reason=reason,
        )

    def _corner(self, position: int) -> tuple[float, float]:
        """Where the wanted shape is cut out: fractions of what is left over."""
        if self.config.crop == "center":
            return 0.5, 0.5
        left, top = rng(self.config.seed, self.config.phase, position, "crop").random(2)
        return left, top

    def _mirrored(self, position: int, row: int) -> dict[str, Any] | None:
        """What the sample's json member says where the sample is mirrored, else None."""
        config = self.config
        if not config.flip or rng(config.seed, config.phase, position, "flip").random() < 0.5:
            return None
        facts = json.loads(self._member(row, "json"))
        return facts if may_flip(self.view.info, config.tokenizer, facts) else None

    def _sizes_of(self, row: int, corner: tuple[float, float], mirrored: dict[str, Any] | None) -> tuple[float, ...]:
        """`Batch.sizes` of one sample. A view that does not tell how its pictures came tells them as they are. Of a mirrored one
        the left edge is the one that was the right: a crop lies where it lies in the whole picture, mirrored.
        """
        height, width = self._shape(row)
        known = {name: column[row].as_py() for name, column in self._sizes.items()}
        packed = known["width"], known["height"]
        whole, _, left, top = cover_place(packed, (width, height), corner)
        scale = max(width / packed[0], height / packed[1])
        left, top = left + scale * (known.get("crop_left") or 0), top + scale * (known.get("crop_top") or 0)
        if mirrored is not None:
            cut_away = (mirrored.get("scaled_width") or packed[0]) - packed[0]
            left = whole + scale * cut_away - width - left
        original = known.get("original_height") or packed[1], known.get("original_width") or packed[0]
        return *original, top, left, height, width

    def _shape(self, row: int) -> tuple[int, int]:
        """Height and width that the sample is wanted in: a square, or its bucket's shape."""
        if self._buckets is None:
            return self.config.resolution, self.config.resolution
        return shape_of(self._buckets[row].as_py())

    def _picture_shape(self, row: int) -> tuple[int, int, int]:
        height, width = self._shape(row)
        if self.config.latents == "off":
            return 3, height, width
        channels, height, width = self.config.latent_shape_of(height, width)
        return channels * (2 if self.config.drawn_latents else 1), height, width

    def _picture(self, row: int, corner: tuple[float, float], *, flip: bool) -> np.ndarray:
        """The sample as pixels in [-1, 1], or its latents: float32 of `_picture_shape`."""
        config = self.config
        if config.latents == "view":
            latents = read_npy(self._member(row, "latents")).astype(np.float32)
            if latents.shape != self._picture_shape(row):
                raise ValueError(f"its latents are {latents.shape}, not {self._picture_shape(row)}")
            return latents
        height, width = self._shape(row)
        image = cover(open_picture(self._member(row, "image")), (width, height), corner)
        return as_array(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image)

    def _shard(self, row: int) -> str:
        place = self.view.place(row, "image" if self.config.latents == "off" else "latents")
        return place[0] if place else ""

    def _member(self, row: int, member: str) -> bytes:
        """The bytes of a sample's member, which are those that were packed. Raises LookupError, OSError or ValueError."""
        place = self.view.place(row, member)
        if place is None:
            raise LookupError(f"it has no {member}")
        crcs = self._crcs.get(member)
        crc = crcs[row].as_py() if crcs is not None else None
        data = self._shards.read(*place)
        if _is_damaged(data, place[2], crc) and self._shards.forget(place[0]):
            data = self._shards.read(*place)
        if _is_damaged(data, place[2], crc):
            raise ValueError(f"its {member} is damaged: {len(data)} of {place[2]} bytes, or others than were packed")
        return data

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


def _is_damaged(data: bytes, size: int, crc: int | None) -> bool:
    return len(data) != size or (crc is not None and zlib.crc32(data) != crc)


def _ids(ids: tuple[int, ...]) -> np.ndarray:
    return np.asarray(ids, dtype=np.int32)


def read_npy(data: bytes) -> np.ndarray:
    """The array in an npy file's bytes; ValueError where there is none of plain numbers. Not by `np.load`: it reads the header
    with `ast`, which in Python 3.11 fails at times where several threads do (python/cpython issue 106905).
    """
    start = 10 if data[6:7] == b"\x01" else 12
    end = start + int.from_bytes(data[8:start], "little")
    header = _NPY_HEADER.fullmatch(data[start:end])
    if not data.startswith(b"\x93NUMPY") or header is None:
        raise ValueError("it is no npy file of numbers")
    shape = [int(side) for side in header["shape"].split(b",") if side.strip()]
    return np.frombuffer(data, header["type"].decode(), offset=end).reshape(shape).copy()
