"""A stage that tells everything a view is packed from, and builds with it; for the tests of packing, publishing, verifying."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline.captions import TokenizerConfig
from pipeline.plan import Ticket, make_plan
from pipeline.runner import run_plan
from pipeline.shards import ViewInfo
from pipeline.stage import Columns, Stage
from pipeline.storage import Folder
from stages.ingest import ingest
from stages.pack import Pack, PackConfig
from stages.publish import companions_of, publish_view
from tests.small_stages import Small, SmallConfig, small_source

IDS = pa.list_(pa.uint16())


class Facts(Small):
    """url → everything that a view is packed from. `u://40x30` is a picture of 40 by 30 pixels with 40 tokens, `u://40` one
    of 40 by 42; those of odd width have no short caption, and every third one's alt text is supported.
    """

    name = "facts"
    reads = ("url",)
    writes = pa.schema(
        [
            *((name, pa.int32()) for name in ("width", "height", "original_width", "original_height")),
            *((name, pa.string()) for name in ("sha256", "caption", "short_caption", "prompt")),
            *((name, pa.float32()) for name in ("clip_score", "alt_score", "aesthetic_score")),
            ("sentence_scores", pa.list_(pa.float32())),
            ("alt_supported", pa.bool_()),
            *((name, IDS) for name in ("tokens_t5", "tokens_t5_short", "tokens_t5_alt")),
        ]
    )
    payload = {"image": "jpg"}

    def process(self, batch: pa.Table) -> Columns:
        self.note(batch)
        sizes = [size_of(url) for url in batch.column("url").to_pylist()]
        widths = [width for width, _ in sizes]
        images = [jpeg(*size) for size in sizes]
        return {
            "width": widths,
            "height": [height for _, height in sizes],
            "original_width": [2 * width for width in widths],
            "original_height": [2 * height for _, height in sizes],
            "sha256": [hashlib.sha256(image).hexdigest() for image in images],
            "caption": [f"Größe {width}{self.config.suffix}" for width in widths],
            "short_caption": [None if width % 2 else "groß" for width in widths],
            "prompt": ["plain"] * len(widths),
            "clip_score": [width / 100 for width in widths],
            "alt_score": [None] * len(widths),
            "aesthetic_score": [width / 8 for width in widths],
            "sentence_scores": [[width / 100, 0.5] for width in widths],
            "alt_supported": [width % 3 == 0 for width in widths],
            "tokens_t5": [list(range(width)) for width in widths],
            "tokens_t5_short": [None if width % 2 else [7, 1] for width in widths],
            "tokens_t5_alt": [[9, 9, 1]] * len(widths),
            "image": images,
        }


def size_of(url: str) -> tuple[int, int]:
    """Width and height of the URL's picture."""
    width, _, height = url.rsplit("/", 1)[1].partition("x")
    return int(width), int(height or int(width) + 2)


def jpeg(width: int, height: int) -> bytes:
    """A picture of noise."""
    pixels = np.random.default_rng(width).integers(256, size=(height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


def tokenizer(folder: Path, *kinds: str) -> TokenizerConfig:
    """A tokenizer called t5 with these kinds of captions."""
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    config = TokenizerConfig(name="t5", model=str(folder / "tokenizer"))
    return replace(config, captions=tuple((kind, 1.0) for kind in kinds)) if kinds else config  # type: ignore[misc]


def views_of(folder: Path) -> list[Stage]:
    """The stages of two views: one of all pictures from 24 pixels on, one of the larger ones at 32."""
    t5 = tokenizer(folder)
    return [
        Facts(SmallConfig()),
        Pack(PackConfig(view="small", resolution=24, tokenizers=(t5,))),
        Pack(PackConfig(view="large", resolution=32, tokenizers=(t5,), where="width >= 36")),
    ]


def run_stages(
    folder: Path, dataset: Folder, stages: Sequence[Stage], urls: Sequence[str], partition_size: int = 5
) -> list[Ticket]:
    """Builds the stages' tables from a list of these URLs; returns the tickets."""
    partitions = ingest(dataset, small_source(folder, list(urls), partition_size))
    run_plan(dataset, stages, make_plan(dataset, stages, partitions), lambda _: None, runner="local")
    plan = make_plan(dataset, stages, partitions)
    assert plan.is_empty
    return plan.tickets


def pack_urls(
    folder: Path, dataset: Folder, stages: Sequence[Stage], urls: Sequence[str], partition_size: int = 5
) -> list[ViewInfo]:
    """... and names the version of each view."""
    tickets = run_stages(folder, dataset, stages, urls, partition_size)
    packs = [stage for stage in stages if isinstance(stage, Pack)]
    return [publish_view(dataset, pack, tickets, companions_of(pack, stages), stages) for pack in packs]


def pack_views(folder: Path, count: int, dataset: Folder) -> list[ViewInfo]:
    """Packs two views of so many pictures with sides from 20 on."""
    return pack_urls(folder, dataset, views_of(folder), [f"u://{n}" for n in range(20, 20 + count)])
