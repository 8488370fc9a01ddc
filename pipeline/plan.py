"""The plan: the recipe held against a listing of the dataset folder. No database, no lock, no data file opened.

A table's name carries the id of what it was made from (`input id`) and of what it says (`content id`). The input id of a
stage on a partition digests the content ids of the tables it depends on: those whose columns it reads, and those that
may have dropped rows before it. So walking the stages in order, with the names alone, tells what is there, and where the
first missing table makes the rest unknown.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .fingerprint import digest_of
from .stage import Stage
from .storage import Folder
from .tables import TableName, list_tables

PARTITIONS = "partitions"


@dataclass(frozen=True, kw_only=True)
class Partition:
    """A fixed set of samples: the file `partitions/<name>.<rows>.<content id>.parquet`."""

    name: str
    rows: int
    content_id: str

    @property
    def parquet(self) -> str:
        return f"{PARTITIONS}/{self.name}.{self.rows}.{self.content_id}.parquet"


def list_partitions(dataset: Folder) -> list[Partition]:
    """The partitions in ingest order."""
    found = [name.split(".") for name in dataset.list(PARTITIONS)]
    return [Partition(name=p[0], rows=int(p[1]), content_id=p[2]) for p in found if len(p) == 4 and p[3] == "parquet"]


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """A partition on its way through the stages: the tables that exist for it so far."""

    partition: Partition
    tables: dict[str, TableName] = field(default_factory=dict)
    """Per stage name."""

    def with_table(self, stage: Stage, table: TableName) -> Ticket:
        """The ticket after a stage."""
        return Ticket(partition=self.partition, tables={**self.tables, stage.name: table})


def depends_on(stages: Sequence[Stage], index: int) -> list[Stage]:
    """The earlier stages whose tables stage `index` needs: the writers of what it reads, and all that may drop rows."""
    reads = set(stages[index].reads)
    needed: list[Stage] = []
    for stage in reversed(stages[:index]):
        written = {*stage.writes.names, *stage.payload}
        if stage.drops or reads & written:
            needed.insert(0, stage)
            reads -= written
    return needed


def input_id(stages: Sequence[Stage], index: int, ticket: Ticket, before: str) -> str | None:
    """The id of what stage `index` would be given; None while a table it depends on is not there.

    `before` is the stage's input id on the partition before, which counts for an ordered stage only.
    """
    needed = depends_on(stages, index)
    if any(s.name not in ticket.tables for s in needed):
        return None
    contents = [part for s in needed for part in (s.name, ticket.tables[s.name].content_id)]
    return digest_of(ticket.partition.content_id, *contents, before if stages[index].ordered else "")


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """What a build would do for one stage."""

    stage: Stage
    up_to_date: int
    """Partitions whose table is there."""
    to_compute: int
    """Partitions whose table is not there."""
    rows: int
    """Rows of the partitions to compute, before any drops."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is there and what a build would do."""

    stages: list[StagePlan]
    tickets: list[Ticket]
    """One a partition, with the tables that are there and up to date."""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return all(s.to_compute == 0 for s in self.stages)


def make_plan(dataset: Folder, stages: Sequence[Stage], partitions: Iterable[Partition]) -> Plan:
    """Holds the stages against the listing; one listing a stage."""
    tickets = [Ticket(partition=p) for p in partitions]
    plans = []
    for index, stage in enumerate(stages):
        there = tables_there(dataset, stage)
        before: str | None = ""
        done = []
        for spot, ticket in enumerate(tickets):
            wanted = None if before is None else input_id(stages, index, ticket, before)
            if stage.ordered:
                before = wanted
            table = there.get((ticket.partition.name, wanted)) if wanted else None
            done.append(table is not None)
            if table:
                tickets[spot] = ticket.with_table(stage, table)
        missing = [t.partition.rows for t, d in zip(tickets, done, strict=True) if not d]
        plans.append(StagePlan(stage=stage, up_to_date=sum(done), to_compute=len(missing), rows=sum(missing)))
    return Plan(stages=plans, tickets=tickets)


def tables_there(dataset: Folder, stage: Stage) -> dict[tuple[str, str], TableName]:
    """The stage's tables by partition and input id; of several the first by name."""
    there: dict[tuple[str, str], TableName] = {}
    for table in list_tables(dataset, stage.folder):
        there.setdefault((table.partition, table.input_id), table)
    return there
