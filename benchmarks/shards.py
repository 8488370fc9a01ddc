"""Which shards a change of 1 % of the samples rewrites: `python -m benchmarks.shards --samples 20000 --partitions 100`.

Builds a dataset of tiny pictures through the engine, with a view for each keep rate. Then 1 % of the samples change, either
their captions or the score that decides whether they are in a view, in few partitions (`together`) or in all (`spread`).
Prints for each view how many of its shards hold a sample that changed, how many were rewritten, and how many would be if the
same samples were written one after the other with webdataset's ShardWriter; last, one line of JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.plan import make_plan
from pipeline.runner import run_plan
from pipeline.sample import sample_key
from pipeline.shards import View, ViewInfo
from pipeline.stage import Columns, Stage
from pipeline.storage import Folder
from stages.ingest import ingest
from stages.pack import Pack, PackConfig
from stages.publish import publish_view
from stages.source import Source

KEEP = {"all": 1.0, "half": 0.5, "tenth": 0.1, "hundredth": 0.01}
"""The views, and how much of the samples each takes."""


@dataclass(frozen=True, kw_only=True)
class Edition:
    """A change to the samples."""

    kind: str = "none"
    """`caption` or `score`: what of them changes."""
    urls: frozenset[str] = frozenset()
    """Whose."""

    def __post_init__(self) -> None:
        assert self.kind in ("none", "caption", "score")


@dataclass(frozen=True, kw_only=True)
class _SampleConfig:
    name: str = "none together"
    batch_size: int = 1000


class Samples(Stage):
    """url → a picture of 16 by 16 pixels, a caption, and a score between 0 and 1."""

    name = "samples"
    reads = ("url",)
    writes = pa.schema(
        [("width", pa.int32()), ("height", pa.int32()), ("caption", pa.string()), ("clip_score", pa.float32())]
    )
    payload = {"image": "jpg"}
    config: _SampleConfig

    def __init__(self, config: _SampleConfig, edition: Edition) -> None:
        super().__init__(config)
        self._edition = edition

    def load(self) -> None:
        """Makes the picture."""
        out = io.BytesIO()
        Image.new("RGB", (16, 16), "teal").save(out, "JPEG")
        self._picture = out.getvalue()

    def process(self, batch: pa.Table) -> Columns:
        """The same for the same URL and edition."""
        urls = batch.column("url").to_pylist()
        count = len(urls)
        return {
            "image": [self._picture] * count,
            "width": [16] * count,
            "height": [16] * count,
            "caption": [f"a picture of {url}" + self._changed(url, "caption") for url in urls],
            "clip_score": [zlib.crc32((url + self._changed(url, "score")).encode()) / 2**32 for url in urls],
        }

    def _changed(self, url: str, kind: str) -> str:
        return " anew" if self._edition.kind == kind and url in self._edition.urls else ""


def editions(urls: Sequence[str]) -> dict[str, Edition]:
    """The changes, by name: the first hundredth of the samples, or each hundredth one."""
    together, spread = frozenset(urls[: len(urls) // 100]), frozenset(urls[::100])
    return {
        f"{kind} {where}": Edition(kind=kind, urls=chosen)
        for kind in ("caption", "score")
        for where, chosen in (("together", together), ("spread", spread))
    }


class World:
    """The dataset, built in one edition after the other."""

    def __init__(self, root: Path, samples: int, partitions: int) -> None:
        self.dataset = Folder(url=str(root / "dataset"))
        self.urls = [f"https://pictures.example/{number}.jpg" for number in range(samples)]
        self._source = Source(path=str(root / "source.parquet"), partition_size=samples // partitions)
        pq.write_table(pa.table({"url": self.urls, "text": [""] * samples}), self._source.path)

    def build(self, name: str, edition: Edition) -> dict[str, ViewInfo]:
        """The views' versions in this edition."""
        packs = [
            Pack(PackConfig(view=view, resolution=16, tokenizers=(), where=f"clip_score < {share}"))
            for view, share in KEEP.items()
        ]
        stages = [Samples(_SampleConfig(name=name), edition), *packs]
        partitions = ingest(self.dataset, self._source)
        run_plan(self.dataset, stages, make_plan(self.dataset, stages, partitions), lambda _: None, runner="local")
        tickets = make_plan(self.dataset, stages, partitions).tickets
        return {pack.config.view: publish_view(self.dataset, pack, tickets) for pack in packs}

    def shards(self, info: ViewInfo) -> dict[str, list[str]]:
        """Keys by shard."""
        found: dict[str, list[str]] = {}
        for rows in View(self.dataset, info).manifest.batches(["key", "shard"]):
            for key, shard in zip(rows.column("key").to_pylist(), rows.column("shard").to_pylist(), strict=True):
                found.setdefault(shard, []).append(key)
        return found

    def told(self, info: ViewInfo) -> dict[str, str]:
        """What the view tells of its samples, in their order."""
        view = View(self.dataset, info)
        keys = view.manifest.column("key").to_pylist()
        return {key: view.read(row, "json").decode() for row, key in enumerate(keys)}

    def size(self, shard: str) -> int:
        """Bytes."""
        return Path(self.dataset.path(shard)).stat().st_size


def naive_shards(samples: Mapping[str, str], per_shard: int) -> set[str]:
    """Digests of what ShardWriter makes of the samples, one after the other."""
    import webdataset

    with tempfile.TemporaryDirectory() as folder:
        with webdataset.ShardWriter(f"{folder}/%06d.tar", maxcount=per_shard, mtime=0, verbose=0) as writer:
            for key, told in samples.items():
                writer.write({"__key__": key, "txt": told})
        return {hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).glob("*.tar")}


def compare(
    world: World, changed: frozenset[str], before: ViewInfo, after: ViewInfo, per_shard: int
) -> dict[str, float]:
    """What became of one view's shards."""
    keys = set(map(sample_key, changed))
    old, new = world.shards(before), world.shards(after)
    held = {_partition(s) for there in (old, new) for s, held in there.items() if keys.intersection(held)}
    rewritten = new.keys() - old.keys()
    naive_old, naive_new = (naive_shards(world.told(info), per_shard) for info in (before, after))
    return {
        "samples": after.samples,
        "shards": len(new),
        "hold_changed": len(held),
        "rewritten": len({_partition(shard) for shard in rewritten}),
        "rewritten_bytes": sum(map(world.size, rewritten)),
        "bytes": sum(map(world.size, new)),
        "naive_shards": len(naive_new),
        "naive_rewritten": len(naive_new - naive_old),
    }


def _partition(shard: str) -> str:
    return shard.rsplit("/", 1)[1].split(".")[0]


def measure(samples: int, partitions: int) -> Iterator[dict[str, float | str]]:
    """A row for each change and view."""
    with tempfile.TemporaryDirectory(prefix="densebridge-benchmark-") as folder:
        world = World(Path(folder), samples, partitions)
        before = world.build("none", Edition())
        for name, edition in editions(world.urls).items():
            after = world.build(name, edition)
            for view, share in KEEP.items():
                found = compare(world, edition.urls, before[view], after[view], samples // partitions)
                yield {"change": name, "keep": share, **found}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--partitions", type=int, default=100)
    given = parser.parse_args()
    rows = []
    print(
        f"{'change of 1 %':<17} {'keep':>5} {'samples':>8} {'shards':>7} {'hold them':>10} {'rewritten':>10}", end=" "
    )
    print(f"{'MB of':>7} {'MB':>7} {'naive':>12}")
    for row in measure(given.samples, given.partitions):
        rows.append(row)
        megabytes = [f"{float(row[name]) / 1e6:>7.2f}" for name in ("rewritten_bytes", "bytes")]
        naive = f"{row['naive_rewritten']} of {row['naive_shards']}"
        counts = f"{row['samples']:>8} {row['shards']:>7} {row['hold_changed']:>10} {row['rewritten']:>10}"
        print(f"{row['change']:<17} {row['keep']:>5} {counts} {' '.join(megabytes)} {naive:>12}", flush=True)
    print(json.dumps({"benchmark": "shards", "samples": given.samples, "partitions": given.partitions, "rows": rows}))


if __name__ == "__main__":
    main()
