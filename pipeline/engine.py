"""Runs one stage on one partition: gathers its rows, reuses what it can, computes the rest batch by batch, publishes.

This is all that a worker does, on Ray or in-process; it depends on the dataset folder alone, so the bytes are the same.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, get_args

from .plan import Partition, Ticket, input_id, list_partitions, make_plan
from .reuse import find_reusable, merge_rows
from .rows import gather
from .sample import Status
from .stage import Columns, Stage
from .storage import Folder
from .tables import TableName, list_tables, writing_table


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a worker has to tell after each batch."""

    stage: str
    rows: int
    """Rows done since the last report."""
    reused: int = 0
    """Of them, taken from an earlier table."""
    ends: dict[str, int] = field(default_factory=dict)
    """Rows that ended here since the last report, by `status:reason`."""
    seconds: float = 0.0
    """Time since the last report."""


Report = Callable[[Progress], None]


class StageWorker:
    """One stage in one process. Loads the stage when there is the first row to compute."""

    def __init__(self, dataset: Folder, stages: Sequence[Stage], index: int) -> None:
        self.dataset, self.stages, self.index = dataset, list(stages), index
        self.stage = self.stages[index]
        self._loaded = False
        self._tables: dict[str, list[TableName]] | None = None  # by partition, as the listing was when work began
        self._input_ids: dict[str, str] = {}  # by partition, for an ordered stage's next one
        self._lived = 0  # partitions from the first on whose rows an ordered stage has been shown

    def work(self, ticket: Ticket, report: Report) -> Ticket:
        """Makes the stage's table for the ticket's partition, unless it is there; returns the ticket with it."""
        before = self._before(ticket) if self.stage.ordered else ""
        wanted = input_id(self.stages, self.index, ticket, before)
        if wanted is None:
            raise RuntimeError(f"partition {ticket.partition.name} came before its inputs were there")
        self._input_ids[ticket.partition.name] = wanted
        there = self._tables_of(ticket.partition)
        found = next((table for table in there if table.input_id == wanted), None)
        if not found and self.stage.ordered:
            self._live_through(self._spots[ticket.partition.name])
        return ticket.with_table(self.stage, found or self._make(ticket, wanted, there, report))

    def _tables_of(self, partition: Partition) -> list[TableName]:
        """The stage's earlier tables of a partition. Listed once: a build has as many listings as stages, not as tables."""
        if self._tables is None:
            self._tables = {}
            for table in list_tables(self.dataset, self.stage.folder):
                self._tables.setdefault(table.partition, []).append(table)
        return self._tables.get(partition.name, [])

    @cached_property
    def _partitions(self) -> list[Partition]:
        return list_partitions(self.dataset)

    @cached_property
    def _spots(self) -> dict[str, int]:
        return {p.name: spot for spot, p in enumerate(self._partitions)}

    def _before(self, ticket: Ticket) -> str:
        """An ordered stage's input id on the partition before; what does not come in order is found in the listing."""
        spot = self._spots[ticket.partition.name]
        if spot == 0:
            return ""
        last = self._partitions[spot - 1].name
        if last not in self._input_ids:
            self._find_input_ids()
        if last not in self._input_ids:
            raise RuntimeError(f"partition {last} is not ready, and {ticket.partition.name} follows it")
        return self._input_ids[last]

    def _find_input_ids(self) -> None:
        """The input ids that the listing tells, up to the first partition that is not ready: all that follow will come."""
        before = ""
        for ticket in make_plan(self.dataset, self.stages[: self.index], self._partitions).tickets:
            found = input_id(self.stages, self.index, ticket, before)
            if found is None:
                return
            before = self._input_ids[ticket.partition.name] = found

    def _live_through(self, until: int) -> None:
        """Shows an ordered stage the rows of earlier partitions that it has not seen, so that it knows what came first."""
        if self._lived >= until:
            return
        self._load()
        tickets = make_plan(self.dataset, self.stages[: self.index], self._partitions[:until]).tickets
        for ticket in tickets[self._lived :]:
            for batch in gather(self.dataset, self.stages, self.index, ticket).batches(self.stage.batch_size):
                self.stage.process(batch.table)
            self._lived += 1

    def _load(self) -> None:
        if not self._loaded:
            self.stage.load()
            self._loaded = True

    def _make(self, ticket: Ticket, wanted: str, there: Sequence[TableName], report: Report) -> TableName:
        given = gather(self.dataset, self.stages, self.index, ticket)
        # An ordered stage's rows depend on more than their own values.
        reused = find_reusable(self.dataset, self.stage, [] if self.stage.ordered else there, given)
        if reused.positions:
            count = len(reused.positions)
            report(Progress(stage=self.stage.name, rows=count, reused=count, ends=reused.ends))
        fresh = given.without(set(reused.positions))
        if fresh.rows.num_rows:
            self._load()
        with writing_table(self.dataset, self.stage) as writer:
            for batch in fresh.batches(self.stage.batch_size):
                started = time.perf_counter()
                columns = self.stage.process(batch.table)
                self._check(columns, batch.table.num_rows)
                report(_progress(self.stage.name, columns, batch.table.num_rows, time.perf_counter() - started))
                merge_rows(writer, batch, columns, reused, batch.positions[-1])
            merge_rows(writer, None, {}, reused, len(given.made_from))
            if self.stage.ordered:
                self._lived = max(self._lived, self._spots[ticket.partition.name] + 1)
            return writer.publish(self.dataset, ticket.partition.name, wanted)

    def _check(self, columns: Columns, count: int) -> None:
        wanted = {*self.stage.writes.names, *self.stage.payload}
        if set(columns) - {"status", "reason"} != wanted or any(len(v) != count for v in columns.values()):
            sizes = {name: len(v) for name, v in columns.items()}
            raise ValueError(
                f"stage {self.stage.name!r} must return {sorted(wanted)} with {count} rows each, got {sizes}"
            )
        ends = zip(columns.get("status", ["kept"] * count), columns.get("reason", [None] * count), strict=True)
        wrong = next(((s, r) for s, r in ends if s not in get_args(Status) or (s == "kept") is not (r is None)), None)
        if wrong:  # a row of which the funnel would lose sight
            raise ValueError(
                f"stage {self.stage.name!r}: a row is kept, or dropped or failed with a reason, not {wrong[0]} ({wrong[1]})"
            )


def _progress(stage: str, columns: Columns, rows: int, seconds: float) -> Progress:
    statuses: Sequence[Any] = columns.get("status", ())  # without a status none has a reason
    ends = Counter(f"{s}:{r}" for s, r in zip(statuses, columns.get("reason", ()), strict=False) if s != "kept")
    return Progress(stage=stage, rows=rows, ends=dict(ends), seconds=seconds)
