"""Partitions: fixed sets of samples, worked on as one piece. Made once, never re-cut; a takedown only ever takes rows away."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .storage import Folder

PARTITIONS = "partitions"
SOURCES = "sources"
FORMAT = 2
"""Of the dataset folder. It is in a file's name (`partitions/format-2`), so that a listing tells it."""
_FILE = re.compile(r"(?P<name>[0-9]{6,}-[0-9a-f]+)\.(?P<rows>[0-9]+)\.(?P<content_id>[0-9a-f]+)\.parquet")


@dataclass(frozen=True, kw_only=True)
class Partition:
    """The file `partitions/<name>.<rows>.<content id>.parquet`: key, url, text and the source's further columns."""

    name: str
    """`000123-3fa9c1d2`: its place in ingest order, and the content id it was born with, so that two builders that ingest
    at once make two partitions and not one twice."""
    rows: int
    content_id: str
    """Digest of the file; empty while the partition is only planned."""
    absent: str = ""
    """Where the keys lie that the recipe's source no longer lists (`sources/absent/...`); empty if it lists them all."""

    @property
    def parquet(self) -> str:
        return f"{PARTITIONS}/{self.name}.{self.rows}.{self.content_id}.parquet"

    @property
    def has_shrunk(self) -> bool:
        """Whether rows were taken out of it since it was made."""
        return bool(self.content_id) and not self.content_id.startswith(self.name.split("-")[1])

    @property
    def number(self) -> int:
        """Its place in ingest order."""
        return int(self.name.split("-")[0])


def partition_name(number: int, content_id: str) -> str:
    """The name of the partition that is born at this place with this content."""
    return f"{number:06d}-{content_id[:8]}"


def list_partitions(dataset: Folder) -> list[Partition]:
    """All partitions in ingest order. Of several files of one partition the one with the fewest rows counts: a takedown
    has published it, and died before it removed the other. Raises ValueError for a folder of a newer format.
    """
    found: dict[str, Partition] = {}
    for name in dataset.list(PARTITIONS):
        if name.startswith("format-") and name != f"format-{FORMAT}":
            raise ValueError(
                f"{dataset.url} has dataset {name}, this version reads format-{FORMAT}: "
                "use the version that made it, or another folder"
            )
        if not (match := _FILE.fullmatch(name)):
            continue
        partition = Partition(name=match["name"], rows=int(match["rows"]), content_id=match["content_id"])
        other = found.setdefault(partition.name, partition)
        if (partition.rows, partition.content_id) < (other.rows, other.content_id):
            found[partition.name] = partition
    return [found[name] for name in sorted(found)]


def mark_format(dataset: Folder) -> None:
    """Says in the folder which format it has. Raises ValueError where it has a newer one."""
    list_partitions(dataset)
    dataset.write(f"{PARTITIONS}/format-{FORMAT}", b"")
