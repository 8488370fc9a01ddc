"""sha256 → keep or drop: of samples with the same bytes the first in ingest order stays; the others name it."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from pipeline.stage import Columns, Stage


@dataclass(frozen=True, kw_only=True)
class DeduplicateConfig:
    """Exact duplicates need no setting."""


class Deduplicate(Stage):
    """Reads sha256; writes duplicate_of, the key of the sample that stays."""

    name = "deduplicate"
    reads = ("sha256",)
    writes = pa.schema([("duplicate_of", pa.string())])
    ordered = True
    config: DeduplicateConfig

    def load(self) -> None:
        """Starts with nothing seen."""
        self._first: dict[bytes, str] = {}  # digest → key of its first sample; 32 bytes and a key a sample

    def process(self, batch: pa.Table) -> Columns:
        """Marks every row whose bytes came before."""
        originals = []
        for key, sha256 in zip(batch.column("key").to_pylist(), batch.column("sha256").to_pylist(), strict=True):
            first = self._first.setdefault(bytes.fromhex(sha256), key)
            originals.append(None if first == key else first)
        return {
            "duplicate_of": originals,
            "status": ["dropped" if o else "kept" for o in originals],
            "reason": ["duplicate" if o else None for o in originals],
        }
