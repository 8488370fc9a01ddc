"""Stages that sleep for as long as real ones work, and note when: what a machine without GPUs can tell of scheduling."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from pipeline.stage import Columns, Needs, Stage

BYTES = 200
"""Of a picture that stands for one."""


@dataclass(frozen=True, kw_only=True)
class SleeperConfig:
    """How long a stage sleeps."""

    rate: float
    """Rows a second of one actor."""
    notes: str
    """Folder in which each actor notes when it worked."""
    keep: float = 1.0
    """Share of the rows that go on, told by their keys."""
    batch_size: int = 512
    """Rows at a time."""
    needs: Needs
    """What an actor takes."""


class Sleeper(Stage):
    """Sleeps its rows' time; subclasses say what it would have written."""

    not_fingerprinted = (*Stage.not_fingerprinted, "notes", "rate")
    config: SleeperConfig

    def process(self, batch: pa.Table) -> Columns:
        """Sleeps, notes it, and ends the rows that do not go on."""
        began = time.time()
        time.sleep(batch.num_rows / self.config.rate)
        with open(Path(self.config.notes) / f"{self.name}.{os.getpid()}", "a") as file:
            file.write(f"{began} {time.time()} {batch.num_rows}\n")
        keys = batch.column("key").to_pylist()
        stays = [int(key[:8], 16) < self.config.keep * 16**8 for key in keys]
        columns = {
            name: [self.written(key) if stay else None for key, stay in zip(keys, stays, strict=True)]
            for name in (*self.writes.names, *self.payload)
        }
        return {
            **columns,
            "status": ["kept" if stay else "dropped" for stay in stays],
            "reason": [None if stay else "asleep" for stay in stays],
        }

    def written(self, key: str) -> str | bytes:
        """What stands in each of the stage's columns."""
        return key


class Download(Sleeper):
    """url → image."""

    name = "download"
    reads = ("url",)
    writes = pa.schema([])
    payload = {"image": "jpg"}

    def written(self, key: str) -> bytes:
        """Bytes that stand for a picture."""
        return (key.encode() * BYTES)[:BYTES]


class Caption(Sleeper):
    """image → caption."""

    name = "caption"
    reads = ("image",)
    writes = pa.schema([("caption", pa.string())])
    drops = False


class Score(Sleeper):
    """image, caption → what stands for a score."""

    name = "score"
    reads = ("image", "caption")
    writes = pa.schema([("score", pa.string())])
    drops = False
