"""How often a build asks an object store: counted from what the engine does for each stage and partition, as s3fs does it.

What is counted is a first build, to its end: nothing is there to be taken over, nobody dies. Left out are the few requests that a
build makes however many partitions there are (records of the source, settings, each worker's first listing).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.plan import depends_on
from pipeline.stage import Stage
from stages.pack import Pack
from stages.publish import companions_of

PAGE = 1000  # names that a store tells in one answer to a listing
PART = 50 << 20  # bytes of a part of a large object; s3fs sends what is smaller than two of them in one piece


@dataclass(frozen=True, kw_only=True)
class Requests:
    """By what stores charge for them."""

    reads: float = 0.0
    """GET and HEAD."""
    writes: float = 0.0
    """PUT, POST and LIST, which cost about ten times as much."""

    def __add__(self, other: Requests) -> Requests:
        return Requests(reads=self.reads + other.reads, writes=self.writes + other.writes)

    def times(self, count: float) -> Requests:
        """So many of them."""
        return Requests(reads=self.reads * count, writes=self.writes * count)


NO_REQUESTS = Requests()
OPENED = Requests(reads=3)
"""Some columns of a parquet file: its size, its footer, and the columns, which lie together or within 8 KiB of each other.
Where they do not, each further place is one more."""
WRITTEN = Requests(writes=1)
ASKED_FOR = Requests(reads=1, writes=1)
"""An object that is not there: HEAD, and a listing of what might lie under its name."""


def upload(size: float) -> Requests:
    """Of an object of so many bytes: large ones begin, go in parts and end."""
    return WRITTEN if size < 2 * PART else Requests(writes=math.ceil(size / PART) + 2)


def gathering(stages: Sequence[Stage], index: int, rows: float) -> Requests:
    """What a stage is given of one partition: the partition, the last rule's table, those of the columns; of bytes a row each."""
    reads = {*stages[index].reads}
    needed = depends_on(stages, index)
    tables = sum(bool(reads & {*s.writes.names, *s.payload}) for s in needed) + any(s.drops for s in needed)
    has_bytes = any(reads & {*s.payload} for s in needed)
    return OPENED.times(1 + tables) + Requests(reads=rows if has_bytes else 0)


def requests_of(
    stages: Sequence[Stage], index: int, *, partitions: int, rows: float, keeps_all: bool, tar_bytes: float
) -> Requests:
    """All that stage `index` is the cause of: its tables made and published, its funnel counted, its view named.

    `rows`: given to it in all. `keeps_all`: whether no row ends here, so that the funnel need not be read. `tar_bytes`: of
    its payload, a partition.
    """
    stage = stages[index]
    each = gathering(stages, index, rows / partitions)
    if stage.whole:  # every actor looks at all partitions beforehand
        each = each.times(1 + stage.pool[1])
    each += WRITTEN
    if stage.payload:
        each += ASKED_FOR + upload(tar_bytes)
    if stage.recorded:
        each += WRITTEN
    if not keeps_all:
        each += OPENED
    if isinstance(stage, Pack):
        each += OPENED.times(1 + sum(len(s.payload) for s in companions_of(stage, stages)))
    names = partitions * (2 if stage.payload else 1)
    return each.times(partitions) + Requests(writes=math.ceil(names / PAGE))
