"""Small stages for the engine's tests. Each call is written to a file, so calls are counted across processes."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.stage import Columns, Needs, Stage
from stages.source import Source
from tests import unreliable_files  # noqa: F401 - so that workers, who come by these stages, know its protocol


@dataclass(frozen=True, kw_only=True)
class SmallConfig:
    """Settings of the small stages."""

    suffix: str = ""
    least: int = 0
    calls: str = ""
    """A file that gets a line for every row computed."""
    die_at: str = ""
    """A url at which the process dies at once, while the file `calls`.die exists."""
    kill_at: tuple[str, ...] = ()
    """Urls whose description kills the process, always."""
    hang_at: tuple[str, ...] = ()
    """Urls whose description never ends."""
    fail_at: tuple[str, ...] = ()
    """Urls that time out, which another try may help."""
    seconds: float = 0.0
    """What each row takes."""
    batch_size: int = 3
    needs: Needs = Needs(cpus=0.25)


class Small(Stage):
    not_fingerprinted = ("calls", "die_at", "kill_at", "hang_at", "fail_at", "seconds", "batch_size", "needs")
    config: SmallConfig

    def note(self, batch: pa.Table) -> None:
        if self.config.calls:
            with open(self.config.calls, "a") as file:
                file.writelines(f"{self.name} {key} {os.getpid()}\n" for key in batch.column("key").to_pylist())
        time.sleep(self.config.seconds * batch.num_rows)


class Fetch(Small):
    """url → image (bytes of the url) and its size; urls with `bad` fail."""

    name = "fetch"
    reads = ("url",)
    writes = pa.schema([("size", pa.int32()), ("head", pa.string())])
    payload = {"image": "jpg"}
    recorded = True

    def process(self, batch: pa.Table) -> Columns:
        self.note(batch)
        urls = batch.column("url").to_pylist()
        if self.config.die_at in urls and Path(self.config.calls + ".die").exists():
            os._exit(9)
        slow = [url in self.config.fail_at for url in urls]
        good = ["bad" not in url and not late for url, late in zip(urls, slow)]
        return {
            "image": [(u + self.config.suffix).encode() if g else None for u, g in zip(urls, good)],
            "size": [len(u) if g else None for u, g in zip(urls, good)],
            "head": [u[:9] if g else None for u, g in zip(urls, good)],
            "status": ["kept" if g else "failed" for g in good],
            "reason": [None if g else "timeout" if late else "bad_url" for g, late in zip(good, slow)],
            "transient": slow,
        }


class First(Small):
    """head → keep the first of each, over all partitions."""

    name = "first"
    reads = ("head",)
    writes = pa.schema([("first_key", pa.string())])
    ordered = True

    def load(self) -> None:
        self.seen: dict[str, str] = {}

    def process(self, batch: pa.Table) -> Columns:
        self.note(batch)
        pairs = zip(batch.column("head").to_pylist(), batch.column("key").to_pylist())
        firsts = [(self.seen.setdefault(head, key), key) for head, key in pairs]
        return {
            "first_key": [f for f, _ in firsts],
            "status": ["kept" if f == k else "dropped" for f, k in firsts],
            "reason": [None if f == k else "seen" for f, k in firsts],
        }


class Describe(Small):
    """image → caption."""

    name = "describe"
    reads = ("image",)
    writes = pa.schema([("caption", pa.string())])
    drops = False

    def process(self, batch: pa.Table) -> Columns:
        self.note(batch)
        given = {image.decode() for image in batch.column("image").to_pylist()}
        if given.intersection(self.config.kill_at):
            os.kill(os.getpid(), signal.SIGKILL)
        while given.intersection(self.config.hang_at):
            time.sleep(1)
        return {"caption": [image.decode().upper() + self.config.suffix for image in batch.column("image").to_pylist()]}


class Choose(Small):
    """caption → keep those of at least `least` letters."""

    name = "choose"
    reads = ("caption",)
    writes = pa.schema([("length", pa.int32())])

    def process(self, batch: pa.Table) -> Columns:
        self.note(batch)
        lengths = [len(c) for c in batch.column("caption").to_pylist()]
        keep = [n >= self.config.least for n in lengths]
        return {
            "length": lengths,
            "status": ["kept" if k else "dropped" for k in keep],
            "reason": [None if k else "short" for k in keep],
        }


def small_stages(config: SmallConfig, **changed: SmallConfig) -> tuple[Stage, ...]:
    """The four stages, with other settings where named."""
    return tuple(kind(changed.get(kind.name, config)) for kind in (Fetch, First, Describe, Choose))


def small_source(folder: Path, urls: list[str], partition_size: int = 5) -> Source:
    """A source table of these urls; where it is there already it stays as it is, its time too."""
    path, table = folder / "source.parquet", pa.table({"url": urls, "text": ["text of " + u for u in urls]})
    if not (path.exists() and pq.read_table(path).equals(table)):
        pq.write_table(table, path)
    return Source(path=str(path), partition_size=partition_size)


def urls(count: int) -> list[str]:
    """Urls of which every seventh is bad and every fifth shares its head with another."""
    return [f"u://{'bad' if n % 7 == 3 else 'x'}{n % 40:03d}/{n}" for n in range(count)]
