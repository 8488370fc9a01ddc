"""The plan: the recipe held against a listing of the dataset folder. No database, no lock, no data file opened.

A table's name carries the id of what it was made from (`input id`) and of what it says (`content id`). The input id of a
stage on a partition digests the content ids of the tables it depends on: those whose columns it reads, and those that
may have dropped rows before it. So walking the stages in order, with the names alone, tells what is there, and where the
first missing table makes the rest unknown. Why something is missing, `reasons.py` says.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from .fingerprint import digest_of
from .partitions import Partition
from .sample import LISTED
from .stage import Stage
from .storage import Folder
from .tables import TableName, list_tables


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


def input_id(stage: Stage, needed: Sequence[Stage], ticket: Ticket, before: str) -> str | None:
    """The id of what `stage` would be given; None while a table that it depends on (`needed`) is not there.

    `before` is the stage's input id on the partition before, which counts for an ordered stage only.
    """
    parts = [ticket.partition.content_id]
    for other in needed:
        table = ticket.tables.get(other.name)
        if table is None:
            return None
        parts += [other.name, table.content_id]
    parts += [before if stage.ordered else "", ticket.partition.absent if LISTED in stage.reads else ""]
    return digest_of(*parts)


def input_ids(stage: Stage, needed: Sequence[Stage], tickets: Sequence[Ticket]) -> list[str | None]:
    """The ids of what `stage` would be given for each partition, as far as they are known. An ordered stage's follow from
    those before; a `whole` stage's from all of them, so that they are known together or not at all.
    """
    found: list[str | None] = []
    before: str | None = ""
    for ticket in tickets:
        there = ticket.partition.content_id and before is not None
        found.append(input_id(stage, needed, ticket, before or "") if there else None)
        if stage.ordered:
            before = found[-1]
    if not stage.whole:
        return found
    known = [own for own in found if own]
    together = digest_of(*known)
    return [digest_of(own, together) for own in known] if len(known) == len(found) else [None] * len(found)


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """What a build would do for one stage."""

    stage: Stage
    tables: dict[str, list[TableName]]
    """All that the stage's folder holds, by partition; the best first."""
    wanted: list[str | None]
    """Per partition the input id of the table that the recipe asks for; None while what it is made from is not there."""
    missing: list[int]
    """Positions of the partitions whose table is not there."""
    given: list[int]
    """Per partition the rows that the stage is given, as far as names tell: a table that is not there yet may differ."""

    @property
    def up_to_date(self) -> int:
        """Partitions whose table is there."""
        return len(self.given) - len(self.missing)

    @property
    def to_compute(self) -> int:
        """Partitions whose table is not there."""
        return len(self.missing)

    @property
    def rows(self) -> int:
        """Rows of the partitions whose table is not there."""
        return sum(self.given[spot] for spot in self.missing)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is there and what a build would do."""

    stages: list[StagePlan]
    tickets: list[Ticket]
    """One a partition, with the tables that are there and up to date."""
    retry: frozenset[str] = frozenset()
    """Names of the stages whose tables count as missing where they have rows that another try may help."""

    @property
    def until(self) -> int:
        """How many of the stages can be worked on: a `whole` one whose rows are not all there waits for the next plan."""
        waits = (i for i, s in enumerate(self.stages) if s.to_compute and s.stage.whole and None in s.wanted)
        return next(waits, len(self.stages))

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return all(s.to_compute == 0 for s in self.stages)


def make_plan(
    dataset: Folder, stages: Sequence[Stage], partitions: Iterable[Partition], *, retry: bool | Collection[str] = False
) -> Plan:
    """Holds the stages against the listing; one listing a stage. A partition without content id is only planned. `retry`:
    of all stages or those named, what another try may help counts as missing.
    """
    retried = frozenset(s.name for s in stages) if retry is True else frozenset(retry or ())
    tickets = [Ticket(partition=p) for p in partitions]
    kept = [t.partition.rows for t in tickets]  # as far as it is known
    plans = []
    for index, stage in enumerate(stages):
        tables = list_tables(dataset, stage.folder, with_tar=bool(stage.payload))
        needed = depends_on(stages, index)
        plan = StagePlan(stage=stage, tables=tables, wanted=[], missing=[], given=list(kept))
        for spot, (ticket, wanted) in enumerate(zip(tickets, input_ids(stage, needed, tickets), strict=True)):
            plan.wanted.append(wanted)
            table = find_table(tables.get(ticket.partition.name, ()), wanted)
            if table and not (stage.name in retried and table.transient):
                tickets[spot] = ticket.with_table(stage, table)
                kept[spot] = table.kept if stage.drops else kept[spot]
            else:
                plan.missing.append(spot)
                kept[spot] = _expected(stage, kept[spot], tables.get(ticket.partition.name))
        plans.append(plan)
    return Plan(stages=plans, tickets=tickets, retry=retried)


def _expected(stage: Stage, given: int, tables: Sequence[TableName] | None) -> int:
    """Rows that will go on from a table that is not there: as in the last one, and all that it did not know."""
    if not stage.drops or not tables:
        return given
    return min(given, tables[0].kept + max(0, given - tables[0].rows))


def find_table(tables: Iterable[TableName], wanted: str | None) -> TableName | None:
    """The table of this input id; of several the best."""
    return next((table for table in tables if table.input_id == wanted), None)
