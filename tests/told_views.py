"""A view whose samples tell their captions, for the tests of how samples are read."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.shards import View, ViewInfo
from pipeline.storage import Folder
from tests.shard_writing import ShardSample, write_shard

SIDE = 8


def make_told_view(
    root: Path,
    captions: Sequence[str],
    *,
    shards: int = 2,
    facts: Mapping[str, Any] | None = None,
    columns: Mapping[str, int] | None = None,
) -> View:
    """A view "told" of random pictures, 8 to 10 pixels wide and 8 high, each with its caption. `facts`: what all samples tell;
    `columns`: what the manifest says of each beside the rest.
    """
    rng = np.random.default_rng(5)
    samples = []
    for number, caption in enumerate(captions):
        picture, jpg = Image.fromarray(rng.integers(0, 256, (SIDE, SIDE + number % 3, 3), dtype=np.uint8)), io.BytesIO()
        picture.save(jpg, "JPEG")
        samples.append(
            ShardSample(
                key=f"{number:04d}", jpg=jpg.getvalue(), width=picture.width, height=SIDE,
                facts={"caption": caption, **(facts or {})}, tokens={"t5": np.array([3 + number, 1], dtype=np.int32)},
            )
        )  # fmt: skip
    folder = "views/told/1"
    (root / folder).mkdir(parents=True)
    parts = [p for p in np.array_split(np.arange(len(samples)), shards) if len(p)]
    tables = [
        write_shard(root / folder / f"{n}.tar", f"{folder}/{n}.tar", [samples[number] for number in part], crc32=True)
        for n, part in enumerate(parts)
    ]
    manifest = root / folder / "manifest.parquet"
    table = pa.concat_tables(tables)
    for name, value in (columns or {}).items():
        table = table.append_column(name, pa.array([value] * len(table), pa.int32()))
    pq.write_table(table, manifest)
    info = ViewInfo(
        view="told",
        version="1",
        resolution=SIDE,
        samples=len(samples),
        manifest=f"{folder}/manifest.parquet",
        manifest_sha256=hashlib.sha256(manifest.read_bytes()).hexdigest(),
        tokenizers={"t5": {"captions": [["long", 1.0]]}},
    )
    (root / "views" / "told.json").write_text(json.dumps(asdict(info)))
    return View.open(Folder(url=str(root)), "told")
