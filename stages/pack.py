"""A view's condition over all the columns → WebDataset shards at its resolution, and the manifest the trainer reads."""

from __future__ import annotations

import io
import json
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.captions import TokenizerConfig, prompt_facts
from pipeline.sample import LISTED
from pipeline.shards import VIEWS, pack_tokens
from pipeline.stage import Columns, Needs, Stage

from .buckets import Bucket, choose_bucket, cut, make_buckets, plan_crop
from .conditions import columns_of, select_rows
from .pictures import shrinker

PROVENANCE = (
    *("url", "text", "caption", "short_caption", "prompt", "sha256", "directives", "original_width", "original_height"),
    *("clip_score", "sentence_scores", "alt_score", "alt_supported", "aesthetic_score"),
)
"""What a shard says of each sample, as far as any stage has told it."""


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """One view."""

    view: str
    """Its name, under which training asks for it. Letters, digits and dashes."""
    resolution: int
    """Size of the packed pictures in pixels; pictures are scaled down to it, never up."""
    shape: Literal["keep", "square", "buckets"] = "keep"
    """`keep`: shorter side at the resolution, ratio kept; training crops. `square`: the middle square, its side at the
    resolution. `buckets`: the nearest of SDXL's aspect ratios, at an area of about resolution² (see `buckets.py`)."""
    tokenizers: tuple[TokenizerConfig, ...]
    """The tokenizers whose ids go into the shards."""
    where: str = "true"
    """An SQL condition (duckdb) over any columns that stages before it write, such as
    `aesthetic_score > 6 AND least(original_width, original_height) >= 512`."""
    facts: tuple[str, ...] = ()
    """Columns that go into a sample's json beside `PROVENANCE` and those of the condition."""
    quality: int = 95
    """JPEG quality of pictures that were scaled or cropped; others keep their bytes."""
    batch_size: int = 256
    """Samples packed at a time."""
    needs: Needs = field(default_factory=lambda: Needs(cpus=1.0, actors=(1, 8)))
    """What an actor takes."""

    def __post_init__(self) -> None:
        if not self.view.replace("-", "").isalnum():
            raise ValueError(f"a view's name must be letters, digits and dashes, got {self.view!r}")
        if self.resolution < 1:
            raise ValueError(f"view {self.view}: resolution must be at least 1 pixel, got {self.resolution}")


class _Packed(NamedTuple):
    """A picture as it goes into the shard."""

    data: bytes
    width: int
    height: int
    scaled_width: int
    scaled_height: int
    left: int = 0
    top: int = 0


class _TokenMember(NamedTuple):
    """Token ids that go into the shard."""

    column: str
    ending: str
    kind: str
    is_first: bool
    """Whether they are of the tokenizer's first kind of caption, which every sample must have."""


def _token_members(tokenizers: Sequence[TokenizerConfig]) -> Iterator[_TokenMember]:
    for tokenizer in tokenizers:
        for spot, (kind, _) in enumerate(tokenizer.captions):
            column, name = f"tokens_{tokenizer.name}", tokenizer.name
            if spot:
                column, name = f"{column}_{kind}", f"{name}-{kind}"
            yield _TokenMember(column, f"{name}.npy", kind, not spot)


def _token_ids(sample: pa.Table, member: _TokenMember) -> np.ndarray | None:
    """A sample's ids in the type of their column; None where there are none, or of an alt text that the picture belies."""
    if member.kind == "alt" and not sample.column("alt_supported")[0].as_py():
        return None
    column = sample.column(member.column)
    ids = column[0].as_py()
    return None if ids is None else np.asarray(ids, column.type.value_type.to_pandas_dtype())


class Pack(Stage):
    """Reads images, tokens, what the condition asks for and what is known of a sample; writes a shard a partition. Have one
    such stage for each view.
    """

    version = 3
    config: PackConfig
    drops = False  # another view is packed from the same samples, not from what this one left over

    def __init__(self, config: PackConfig) -> None:
        super().__init__(config)
        self.name = f"pack_{config.view}"
        self._tokens = list(_token_members(config.tokenizers))
        columns = [ids.column for ids in self._tokens]
        if any(ids.kind == "alt" for ids in self._tokens):
            columns.append("alt_supported")
        asked = columns_of(config.where, config.view)
        told = dict.fromkeys((*PROVENANCE, *config.facts, *asked))
        own = ("image", "width", "height", LISTED, *columns)
        self.reads = (*own, *(name for name in told if name not in own and name != "key"))
        self.optional = tuple(name for name in PROVENANCE if name not in {*own, *config.facts, *asked})
        # Not "image": the next view would then be packed from this one's small pictures.
        self._image = f"packed_image_{config.view}"
        tokens = {f"packed_{ids.column}": ids.ending for ids in self._tokens}
        self.payload = {self._image: "jpg", "packed_json": "json", **tokens}
        numbers = ("width", "height", "original_width", "original_height", "crop_left", "crop_top")
        self.writes = pa.schema(
            [
                ("packed_bucket", pa.string()),
                *((f"packed_{name}", pa.int32()) for name in numbers),
                *((f"{name}_length", pa.int32()) for name in tokens),
                *((f"{name}_crc32", pa.uint32()) for name in self.payload),
            ]
        )
        self._buckets: tuple[Bucket, ...] = ()
        if config.shape == "square":
            self._buckets = (Bucket(width=config.resolution, height=config.resolution),)
        elif config.shape == "buckets":
            self._buckets = make_buckets(config.resolution)

    @property
    def folder(self) -> str:
        """`views/<view>-<config id>`: a folder of plain WebDataset tars."""
        return f"{VIEWS}/{self.config.view}-{self.config_id}"

    @property
    def spaces(self) -> dict[str, str]:
        """Whose ids are read: the view tells their tokenizer, which must be the one that made them."""
        return {column: t.space for t in self.config.tokenizers for column in t.columns}

    def identity(self) -> Any:
        """The settings, with the tokenizers' files in place of their names."""
        tokenizers = {
            t.name: {**prompt_facts(t), "kinds": [kind for kind, _ in t.captions]} for t in self.config.tokenizers
        }
        return {**super().identity(), "tokenizers": tokenizers}

    def load(self) -> None:
        """Makes img2dataset's Resizer: short side to the resolution, ratio kept, never up."""
        self._resize = shrinker(self.config.resolution, self.config.quality)

    def process(self, batch: pa.Table) -> Columns:
        """Chooses, scales and packs the batch's samples."""
        chosen = select_rows(batch, self.config.where, self.config.view)
        listed, keys = (batch.column(name).to_pylist() for name in (LISTED, "key"))
        rows = []
        for spot, key in enumerate(keys):
            if not listed[spot]:
                rows.append(self._ended("dropped", "not_in_source"))
            elif key not in chosen:
                rows.append(self._ended("dropped", "not_in_view"))
            else:
                rows.append(self._row(batch.slice(spot, 1)))
        return {name: [row[name] for row in rows] for name in rows[0]}

    def _ended(self, status: str, reason: str) -> dict[str, Any]:
        return {**dict.fromkeys((*self.writes.names, *self.payload)), "status": status, "reason": reason}

    def _row(self, sample: pa.Table) -> dict[str, Any]:
        """The packed sample; `sample` is one row."""
        row = sample.to_pylist()[0]
        tokens = {ids.column: _token_ids(sample, ids) for ids in self._tokens}
        if any(tokens[ids.column] is None for ids in self._tokens if ids.is_first):
            return self._ended("dropped", "no_caption")
        bucket = choose_bucket(row["width"], row["height"], self._buckets) if self._buckets else None
        packed = self._cut(row, bucket) if bucket else self._shrunk(row)
        if isinstance(packed, str):
            return self._ended("failed" if packed == "not_an_image" else "dropped", packed)
        sizes = {
            "width": packed.width,
            "height": packed.height,
            "original_width": row.get("original_width") or row["width"],  # where no stage tells, it came as it is
            "original_height": row.get("original_height") or row["height"],
            "crop_left": packed.left,
            "crop_top": packed.top,
        }
        shape = str(bucket) if self.config.shape == "buckets" else None
        scaled = {"scaled_width": packed.scaled_width, "scaled_height": packed.scaled_height, "bucket": shape}
        members: dict[str, bytes | None] = {self._image: packed.data}
        members |= {"packed_json": _json({**self._facts(sample, row), **sizes, **scaled})}
        members |= {f"packed_{name}": None if ids is None else pack_tokens(ids) for name, ids in tokens.items()}
        return {
            **members,
            **{f"packed_{name}_length": None if ids is None else len(ids) for name, ids in tokens.items()},
            **{f"{name}_crc32": None if data is None else zlib.crc32(data) for name, data in members.items()},
            **{f"packed_{name}": value for name, value in sizes.items()},
            "packed_bucket": shape,
            "status": "kept",
            "reason": None,
        }

    def _shrunk(self, row: dict[str, Any]) -> _Packed | str:
        """The whole picture, or why there is none."""
        if min(row["width"], row["height"]) < self.config.resolution:
            return "smaller_than_view"
        data, width, height, _, _, error = self._resize(io.BytesIO(row["image"]))
        return "not_an_image" if error else _Packed(data, width, height, width, height)

    def _cut(self, row: dict[str, Any], bucket: Bucket) -> _Packed | str:
        """The picture's part that fills the bucket, or why there is none."""
        data, crop = row["image"], plan_crop(row["width"], row["height"], bucket)
        if crop is None:
            return "smaller_than_view"
        if (row["width"], row["height"]) != (bucket.width, bucket.height):
            data = cut(data, crop, bucket, self.config.quality)
        if data is None:
            return "not_an_image"
        return _Packed(data, bucket.width, bucket.height, crop.width, crop.height, crop.left, crop.top)

    def _facts(self, sample: pa.Table, row: dict[str, Any]) -> dict[str, Any]:
        """What is known of the sample. A text that is missing is empty: readers that infer types want one and the same."""
        rest = {"image", LISTED, *(ids.column for ids in self._tokens)}
        names = [name for name in self.reads if name in row and name not in rest]
        texts = {name for name in names if pa.types.is_string(sample.schema.field(name).type)}
        return {"key": row["key"]} | {n: "" if row[n] is None and n in texts else row[n] for n in names}


def _json(facts: dict[str, Any]) -> bytes:
    plain = {name: _finite(value) for name, value in facts.items()}
    return json.dumps(plain, sort_keys=True, ensure_ascii=False, default=_spelled, allow_nan=False).encode()


def _finite(value: Any) -> Any:
    """JSON has neither NaN nor infinities."""
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _spelled(value: Any) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)
