"""Tombstones: what was taken down, so that it stays out when its URL comes back in a later list.

`tombstones/<digest>.parquet` holds rows (kind, value, cause): `key` (the digest of a URL, not the URL), `domain`, `sha256`
(of the bytes that came). A key's cause is the kind of what was asked for; files of earlier versions do not tell it. Files
are only ever added.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from urllib.parse import urlsplit

import pyarrow as pa
import yarl

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
    """Without port, in any spelling; a domain stands for its subdomains too."""
    sha256: frozenset[str] = frozenset()
    causes: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Key → what was asked for: `key`, or the `domain` or `sha256` that it was there with."""

    def __bool__(self) -> bool:
        return bool(self.keys or self.domains or self.sha256)

    def refuses_url(self, url: str) -> bool:
        """Whether the URL lies in a domain that was taken down."""
        if not self.domains:
            return False
        until_host = _UNTIL_HOST.match(url)
        return not self._spellings.isdisjoint(_domains_of(until_host[0] if until_host else url))

    @cached_property
    def _spellings(self) -> frozenset[str]:
        return frozenset(spelling for domain in self.domains for spelling in host_spellings(domain))


def host_spellings(host: str) -> frozenset[str]:
    """A host in letters as the fetcher reads them, and in the name system's own spelling (xn--…)."""
    letters = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", host).lower())
    letters = letters.replace("。", ".").rstrip(".")
    try:
        return frozenset({letters, yarl.URL.build(scheme="http", host=letters).raw_host or letters})
    except ValueError:  # no name, so nothing can be fetched there
        return frozenset({letters})


@lru_cache(maxsize=1 << 16)  # parsing takes 8 µs, and of millions of URLs most share a host with others
def _domains_of(url: str) -> frozenset[str]:
    """The host of a URL and all domains in which it lies, in each spelling."""
    try:
        hosts = host_spellings(urlsplit(url).hostname or "")
    except ValueError:  # no URL, so no domain's either
        return frozenset()
    split = [host.split(".") for host in hosts]
    return frozenset(".".join(labels[start:]) for labels in split for start in range(len(labels)))


def read_tombstones(dataset: Folder) -> Tombstones:
    """All tombstones of the dataset folder. Raises ValueError in one line where a file of them cannot be understood."""
    found: dict[str, set[str]] = {"key": set(), "domain": set(), "sha256": set()}
    causes: dict[str, str] = {}
    for name in dataset.list(TOMBSTONES):
        if name.endswith(".parquet"):
            for row in _read_rows(dataset, f"{TOMBSTONES}/{name}"):
                found[row["kind"]].add(row["value"])
                if (
                    row["kind"] == "key" and causes.get(row["value"]) != "key"
                ):  # whoever asked for it itself comes first
                    causes[row["value"]] = row.get("cause", "key")
    return Tombstones(
        keys=frozenset(found["key"]),
        domains=frozenset(found["domain"]),
        sha256=frozenset(found["sha256"]),
        causes=causes,
    )


def _read_rows(dataset: Folder, name: str) -> list[dict[str, str]]:
    try:
        table = read_parquet(dataset, name)
    except ValueError:
        raise ValueError(
            f"{dataset.url}/{name} is damaged: restore it from a backup: without it, what was taken down would come back"
        ) from None
    kinds = set(table.column("kind").to_pylist()) if "kind" in table.column_names else {"none"}
    if unknown := kinds - {"key", "domain", "sha256"}:
        raise ValueError(
            f"{dataset.url}/{name} was made by a newer version, with a kind that this one does not know "
            f"({', '.join(map(str, unknown))}): use the version that made it"
        )
    return table.to_pylist()


def write_tombstones(
    dataset: Folder,
    *,
    keys: Iterable[str] = (),
    domains: Iterable[str] = (),
    sha256: Iterable[str] = (),
    causes: Mapping[str, str] | None = None,
) -> None:
    """Adds tombstones; those that are there already change nothing. `causes` is of the keys that were not asked for
    themselves.
    """
    rows = [("key", k, (causes or {}).get(k, "key")) for k in sorted(set(keys))]
    rows += [("domain", d, "domain") for d in sorted(set(domains))]
    rows += [("sha256", s, "sha256") for s in sorted(set(sha256))]
    if rows:
        columns = dict(zip(("kind", "value", "cause"), zip(*rows), strict=True))
        data = parquet_bytes(pa.table({name: list(values) for name, values in columns.items()}))
        dataset.write(f"{TOMBSTONES}/{digest_of(data)}.parquet", data)
