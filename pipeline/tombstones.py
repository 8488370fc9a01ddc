"""Tombstones: what was taken down, so that it stays out when its URL comes back in a later list.

`tombstones/<digest>.parquet` holds rows (kind, value): `key` (the digest of a URL, not the URL), `domain`, `sha256` (of the
bytes that came). Files are only ever added.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import urlsplit

import pyarrow as pa

from .fingerprint import digest_of
from .storage import Folder
from .tables import parquet_bytes, read_parquet

TOMBSTONES = "tombstones"
_UNTIL_HOST = re.compile(r"[^/?#]*//[^/?#]*")
TAKEN_DOWN = "taken_down"
"""The reason of rows whose bytes were taken down."""


@dataclass(frozen=True, kw_only=True)
class Tombstones:
    """What no build may bring back."""

    keys: frozenset[str] = frozenset()
    domains: frozenset[str] = frozenset()
    """Lower case, without port; a domain stands for its subdomains too."""
    sha256: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.keys or self.domains or self.sha256)

    def refuses_url(self, url: str) -> bool:
        """Whether the URL lies in a domain that was taken down."""
        if not self.domains:
            return False
        until_host = _UNTIL_HOST.match(url)
        return not self.domains.isdisjoint(_domains_of(until_host[0] if until_host else url))


@lru_cache(maxsize=1 << 16)  # parsing takes 8 µs, and of millions of URLs most share a host with others
def _domains_of(url: str) -> frozenset[str]:
    """The host of a URL and all domains in which it lies."""
    try:
        labels = (urlsplit(url).hostname or "").rstrip(".").split(".")
    except ValueError:  # no URL, so no domain's either
        return frozenset()
    return frozenset(".".join(labels[start:]) for start in range(len(labels)))


def read_tombstones(dataset: Folder) -> Tombstones:
    """All tombstones of the dataset folder."""
    found: dict[str, set[str]] = {"key": set(), "domain": set(), "sha256": set()}
    for name in dataset.list(TOMBSTONES):
        if name.endswith(".parquet"):
            for row in read_parquet(dataset, f"{TOMBSTONES}/{name}").to_pylist():
                found[row["kind"]].add(row["value"])
    return Tombstones(
        keys=frozenset(found["key"]), domains=frozenset(found["domain"]), sha256=frozenset(found["sha256"])
    )


def write_tombstones(
    dataset: Folder, *, keys: Iterable[str] = (), domains: Iterable[str] = (), sha256: Iterable[str] = ()
) -> None:
    """Adds tombstones; those that are there already change nothing."""
    rows = [("key", k) for k in sorted(set(keys))]
    rows += [("domain", d) for d in sorted(set(domains))]
    rows += [("sha256", s) for s in sorted(set(sha256))]
    if rows:
        data = parquet_bytes(pa.table({"kind": [kind for kind, _ in rows], "value": [value for _, value in rows]}))
        dataset.write(f"{TOMBSTONES}/{digest_of(data)}.parquet", data)
