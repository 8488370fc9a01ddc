"""Writes a shard by hand, for tests that need a view and no build."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.shards import ShardWriter, pack_tokens


@dataclass(frozen=True, kw_only=True)
class ShardSample:
    """One sample on its way into a shard."""

    key: str
    jpg: bytes
    width: int
    height: int
    facts: dict[str, Any]
    """What goes into the json member; JSON values only."""
    tokens: dict[str, np.ndarray]
    """Token ids per tokenizer (`t5`) and further kind of caption (`t5_short`): (length,) each."""
    latents: np.ndarray | None = None
    """What a VAE made of the picture."""


def write_shard(path: Path | str, name: str, samples: Iterable[ShardSample], *, crc32: bool = False) -> pa.Table:
    """Writes one whole tar at `path` and returns its manifest rows, in which the shard is called `name`; with the members'
    crc32, as stages write them, where asked.
    """
    writer = ShardWriter(path)
    rows: list[dict[str, Any]] = []
    for sample in samples:
        members = {"jpg": sample.jpg, "json": json.dumps(sample.facts, sort_keys=True).encode()}
        members |= {f"{tokenizer}.npy": pack_tokens(ids) for tokenizer, ids in sample.tokens.items()}
        if sample.latents is not None:
            members["latents"] = pack_tokens(sample.latents)
        writer.write(sample.key, members)
        rows.append({"key": sample.key, "shard": name, "width": sample.width, "height": sample.height})
        if crc32:
            rows[-1] |= {f"{_member(ending)}_crc32": zlib.crc32(data) for ending, data in members.items()}
        rows[-1] |= {f"tokens_{t}_length": len(ids) for t, ids in sample.tokens.items()}
    places = writer.close()
    for row in rows:
        for extension, (offset, size) in places[row["key"]].items():
            row |= {f"{_member(extension)}_offset": offset, f"{_member(extension)}_size": size}
    blank = dict.fromkeys(name for row in rows for name in row)  # what one sample has, another may lack
    return pa.Table.from_pylist([blank | row for row in rows])


def _member(ending: str) -> str:
    """What the manifest calls it."""
    named = {"jpg": "image", "json": "json", "latents": "latents"}
    return named.get(ending, "tokens_" + ending.removesuffix(".npy"))
