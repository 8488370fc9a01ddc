"""Runs one stage on one partition: gathers its rows, reuses what it can, computes the rest batch by batch, publishes.

This is all that a worker does, on Ray or in-process; it depends on the dataset folder alone, so the bytes are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import pyarrow as pa
import pyarrow.compute as pc

from .compute import Computation, Progress, Report
from .earlier import Earlier, Sibling, find_siblings
from .partitions import Partition
from .plan import Ticket, depends_on, find_table, input_id, input_ids, make_plan
from .quarantine import REASONS, Ledger, Watch
from .records import write_record
from .reuse import find_reusable, merge_rows, unchanged_tar
from .rows import gather
from .stage import Stage
from .storage import Folder
from .tables import TableName, list_tables, read_table, writing_table
from .tombstones import read_tombstones


class StageWorker:
    """One stage in one process. Loads the stage when there is the first row to compute."""

    def __init__(
        self,
        dataset: Folder,
        stages: Sequence[Stage],
        index: int,
        partitions: Sequence[Partition],
        *,
        retry: bool = False,
        watch: Watch | None = None,
    ) -> None:
        """`partitions` are all of the recipe's, in order. `retry`: rows that another try may help are tried again."""
        self.dataset, self.stages, self.stage = dataset, list(stages), stages[index]
        self._index, self._partitions, self._retry, self._watch = index, partitions, retry, watch or Ledger()
        self._needed = depends_on(stages, index)
        self._loaded = False
        self._input_ids: dict[str, str] = {}  # by partition, for an ordered stage's next one
        self._lived = 0  # partitions from the first on whose rows an ordered stage has been shown

    def work(self, ticket: Ticket, report: Report) -> Ticket:
        """Makes the stage's table for the ticket's partition, unless it is there; returns the ticket with it."""
        name = ticket.partition.name
        wanted = self._wanted(ticket)
        if wanted is None:
            raise RuntimeError(f"partition {name} came before its inputs were there")
        self._input_ids[name] = wanted
        there = self._tables.get(name, [])
        found = find_table(there, wanted)
        if found and not (self._retry and found.transient):
            return ticket.with_table(self.stage, found)
        if self.stage.ordered:
            self._live_through(self._spots[name])
        return ticket.with_table(self.stage, self._make(ticket, wanted, there, report))

    def _wanted(self, ticket: Ticket) -> str | None:
        if not self.stage.whole:
            return input_id(self.stage, self._needed, ticket, self._before(ticket) if self.stage.ordered else "")
        if not self._input_ids:
            self._find_input_ids()
        return self._input_ids.get(ticket.partition.name)

    @cached_property
    def _tables(self) -> dict[str, list[TableName]]:
        """The stage's earlier tables. Listed once: a build has as many listings as stages, not as tables."""
        return list_tables(self.dataset, self.stage.folder, with_tar=bool(self.stage.payload))

    @cached_property
    def _siblings(self) -> list[Sibling]:
        return find_siblings(self.dataset, self.stage)

    @cached_property
    def _taken_down(self) -> frozenset[str]:
        """Digests that no row may bring back; asked for by a stage that tells digests, and by no other."""
        return read_tombstones(self.dataset).sha256 if "sha256" in self.stage.writes.names else frozenset()

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
        """The input ids that the listing tells; of an ordered stage up to the first partition that is not ready."""
        tickets = make_plan(self.dataset, self.stages[: self._index], self._partitions).tickets
        found = zip(self._partitions, input_ids(self.stage, self._needed, tickets), strict=True)
        self._input_ids |= {partition.name: own for partition, own in found if own}

    def _live_through(self, until: int) -> None:
        """Shows an ordered stage the rows of earlier partitions that it has not seen, so that it knows what came first."""
        if self._lived >= until:
            return
        self._load()
        # With its own tables: rows that killed its worker were not shown to it then, and must not be now.
        tickets = make_plan(self.dataset, self.stages[: self._index + 1], self._partitions[:until]).tickets
        for ticket in tickets[self._lived :]:
            given = gather(self.dataset, self.stages, self._index, ticket, only_shown=True)
            own = ticket.tables.get(self.stage.name)
            for batch in given.without_keys(self._set_aside(own)).batches(self.stage.batch_size):
                self.stage.process(batch.table)
            self._lived += 1

    def _set_aside(self, table: TableName | None) -> set[str]:
        if table is None or not table.transient:
            return set()
        rows = read_table(self.dataset, table, ["key", "reason"])
        return set(rows.filter(pc.is_in(rows.column("reason"), value_set=pa.array(REASONS))).column("key").to_pylist())

    def _load(self) -> None:
        """Loads the stage. One whose loading kills its workers would be started for ever, so that is an error."""
        if self._loaded:
            return
        place, what = f"{self.stage.folder}/load", [self._watch.worker]
        if self._watch.begin(place, what, self.stage.needs.deadline) != "go":
            raise RuntimeError(
                "its workers die while they load it (out of memory?): see Ray's logs, or try --runner local"
            )
        self.stage.load()
        self._loaded = True
        if self.stage.whole:
            self.stage.survey(self._all_rows())
        self._watch.end(place, what)

    def _all_rows(self) -> Iterator[pa.Table]:
        """What a `whole` stage is given of all partitions, batch by batch."""
        for ticket in make_plan(self.dataset, self.stages[: self._index], self._partitions).tickets:
            given = gather(self.dataset, self.stages, self._index, ticket, only_shown=True)
            yield from (batch.table for batch in given.batches(self.stage.batch_size))

    def _make(self, ticket: Ticket, wanted: str, there: Sequence[TableName], report: Report) -> TableName:
        name = ticket.partition.name
        given = gather(self.dataset, self.stages, self._index, ticket)
        made_from = dict(zip(given.rows.column("key").to_pylist(), given.made_from, strict=True))
        earlier = Earlier(self.dataset, self.stage, self._siblings, name, made_from)
        if self.stage.ordered or self.stage.whole:  # whose rows depend on more than their own values
            reused = find_reusable(self.dataset, self.stage, [], given, earlier=None, retry=False)
        else:
            reused = find_reusable(self.dataset, self.stage, there, given, earlier=earlier, retry=self._retry)
        if reused.positions:
            report(Progress(stage=self.stage.name, rows=len(reused.positions), ends=reused.ends))
        fresh = given.without(set(reused.positions))
        if fresh.rows.num_rows:
            self._load()
        place = f"{self.stage.folder}/{name}"
        computation = Computation(
            self.stage, place, earlier=earlier, taken_down=self._taken_down, watch=self._watch, report=report
        )
        computation.isolate_suspects(fresh)
        same_tar = "" if fresh.rows.num_rows else unchanged_tar(reused)
        with writing_table(self.dataset, self.stage, same_tar) as writer:
            for batch in fresh.batches(self.stage.batch_size):
                merge_rows(writer, batch, computation.run(batch), reused, batch.positions[-1])
            if same_tar:
                writer.take(reused.rows)
            else:
                merge_rows(writer, None, {}, reused, len(given.made_from))
            if self.stage.ordered:
                self._lived = max(self._lived, self._spots[name] + 1)
            table = writer.finish(name, wanted)
            if table.rows != len(given.made_from):
                raise RuntimeError(f"{table.rows} rows came of {len(given.made_from)}: this is a bug in the engine")
            if self.stage.recorded:
                keys, tried = (g.rows.column("key").to_pylist() for g in (given, fresh))
                write_record(self.dataset, table, there, keys, tried)
            writer.publish(self.dataset)
        self._watch.forget(place)
        return table
