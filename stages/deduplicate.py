"""sha256 → keep or drop: of samples with the same bytes the first in ingest order stays; the others name it."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from pipeline.sample import LISTED
from pipeline.stage import Columns, Stage


@dataclass(frozen=True, kw_only=True)
class DeduplicateConfig:
    """Exact duplicates need no setting."""


class Deduplicate(Stage):
    """Reads sha256 and whether the source lists the sample; writes duplicate_of, the key of the sample that stays.

    What the source no longer lists is nobody's original but that of others like it: else a picture would be lost that is
    listed a second time. It stays kept all the same, for its caption may come to use again.
    """

    name = "deduplicate"
    reads = ("sha256", LISTED)
    writes = pa.schema([("duplicate_of", pa.string())])
    ordered = True
    config: DeduplicateConfig

    def load(self) -> None:
        """Starts with nothing seen."""
        self._first: dict[bytes, str] = {}  # digest → key of its first sample; some 300 bytes a sample
        self._first_unlisted: dict[bytes, str] = {}

    def process(self, batch: pa.Table) -> Columns:
        """Marks every row whose bytes came before."""
        originals = []
        columns = (batch.column(name).to_pylist() for name in ("key", "sha256", LISTED))
        for key, sha256, listed in zip(*columns, strict=True):
            digest = bytes.fromhex(sha256)
            if listed:
                first = self._first.setdefault(digest, key)
            else:
                first = self._first.get(digest) or self._first_unlisted.setdefault(digest, key)
            originals.append(None if first == key else first)
        return {
            "duplicate_of": originals,
            "status": ["dropped" if o else "kept" for o in originals],
            "reason": ["duplicate" if o else None for o in originals],
        }
