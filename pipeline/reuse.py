"""Nothing is computed twice: rows of a stage's earlier tables that were made from the same values are taken over.

Reused and fresh rows are merged in the order of the partition, so that a table's bytes do not tell which row came whence.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from .earlier import Earlier
from .rows import Batch, Given, listed
from .stage import Stage
from .storage import Folder
from .tables import COMMON, TableName, TableWriter, read_payloads, read_table, schema_of, tar_id


@dataclass(kw_only=True)
class Reused:
    """Rows taken over, by rising position among the rows that the stage is given."""

    dataset: Folder
    stage: Stage
    rows: pa.Table
    """The stage's columns and `source`, an index into `tables`."""
    positions: list[int]
    tables: list[TableName]
    _done: int = 0

    @property
    def ends(self) -> dict[str, int]:
        """How many of the rows ended here, by `status:reason`."""
        pairs = zip(self.rows.column("status").to_pylist(), self.rows.column("reason").to_pylist(), strict=True)
        return dict(Counter(f"{s}:{r}" for s, r in pairs if s != "kept"))

    def pop_before(self, end: int, most: int) -> tuple[list[int], dict[str, list[Any]]]:
        """The next rows, `most` at most, whose position is below `end`: their positions and columns, payload included."""
        start = self._done
        self._done = min(bisect_left(self.positions, end, lo=start), start + most)
        rows = self.rows.slice(start, self._done - start)
        columns = {name: rows.column(name).to_pylist() for name in (*COMMON.names, *self.stage.writes.names)}
        columns |= {name: self._payloads(rows, name) for name in self.stage.payload}
        return self.positions[start : self._done], columns

    def _payloads(self, rows: pa.Table, column: str) -> list[bytes | None]:
        found: list[bytes | None] = [None] * rows.num_rows
        there = rows.column(f"{column}_offset").is_valid().to_pylist()
        sources = rows.column("source").to_pylist()
        for index, table in enumerate(self.tables):
            spots = [i for i, (t, s) in enumerate(zip(there, sources, strict=True)) if t and s == index]
            taken = rows.take(pa.array(spots, pa.int64()))
            for spot, data in zip(spots, read_payloads(self.dataset, table, taken, column), strict=True):
                found[spot] = data
        return found


def find_reusable(
    dataset: Folder,
    stage: Stage,
    tables: Sequence[TableName],
    given: Given,
    *,
    earlier: Earlier | None,
    retry: bool,
) -> Reused:
    """What is known already of the given rows: what earlier tables of the stage for this partition hold, then what other
    settings' tables tell (`earlier`). Rows that another try may help are taken where no table has them otherwise; in a
    `retry` only those that the source no longer lists, which nobody asks for again.
    """
    keys = given.rows.column("key").to_pylist()
    wanted = {key + made: spot for spot, (key, made) in enumerate(zip(keys, given.made_from, strict=True))}
    nothing = schema_of(stage).empty_table()
    nothing = nothing.append_column("position", pa.array([], pa.int64())).append_column(
        "source", pa.array([], pa.int32())
    )
    parts, transient, sources = [nothing], [], list(tables)
    for index, table in enumerate(tables):
        if not wanted:
            break
        old = read_table(dataset, table)
        parts.append(_take(old.filter(pc.invert(old.column("transient"))), index, wanted))
        transient.append((old.filter(old.column("transient")), index))
    for table, rows in earlier.revised(wanted, retry=retry) if earlier and wanted else ():
        parts.append(_take(rows, len(sources), wanted))
        sources.append(table)
    for old, index in transient:
        still = old.filter(pc.invert(listed(dataset, old.column("key"), given.absent))) if retry else old
        parts.append(_take(still, index, wanted))
    rows = pa.concat_tables(parts).sort_by("position")
    return Reused(
        dataset=dataset, stage=stage, rows=rows, positions=rows.column("position").to_pylist(), tables=sources
    )


def unchanged_tar(reused: Reused) -> str:
    """The id of the stage's tar that holds just what the reused rows have; empty where there is none such, or where they have
    nothing. Then their bytes need not be moved.
    """
    payloads, tables = list(reused.stage.payload), reused.tables
    there = [reused.rows.column(f"{name}_offset").is_valid() for name in payloads]
    held = reused.rows.filter(reduce(pc.or_, there)) if there else reused.rows.slice(0, 0)
    sources = held.column("source").unique().to_pylist()
    if len(sources) != 1 or tables[sources[0]].folder != reused.stage.folder:
        return ""
    own = tar_id(reused.rows, payloads)
    return own if own == tables[sources[0]].tar_id else ""


def _take(old: pa.Table, source: int, wanted: dict[str, int]) -> pa.Table:
    """The rows of an earlier table that are wanted, with their positions; they are wanted no more."""
    names = pc.binary_join_element_wise(old.column("key"), old.column("made_from"), "").to_pylist()
    spots = [(wanted.pop(name), row) for row, name in enumerate(names) if name in wanted]
    taken = old.take(pa.array([row for _, row in spots], pa.int64()))
    taken = taken.append_column("position", pa.array([p for p, _ in spots], pa.int64()))
    return taken.append_column("source", pa.array([source] * len(spots), pa.int32()))


def merge_rows(
    writer: TableWriter, batch: Batch | None, computed: Mapping[str, Sequence[Any]], reused: Reused, end: int
) -> None:
    """Writes a computed batch and the reused rows below position `end`, in the order of their positions.

    Reused rows come in pieces of a batch's size, for a partition's pictures together are gigabytes.
    """
    fresh: dict[str, Sequence[Any]] = {}
    fresh_positions: list[int] = []
    if batch is not None:
        fresh_positions = batch.positions
        fresh = {**computed, "key": batch.table.column("key").to_pylist(), "made_from": batch.made_from}
    done, more = 0, True
    while more:
        positions, columns = reused.pop_before(end, reused.stage.batch_size)
        more = len(positions) == reused.stage.batch_size
        until = bisect_left(fresh_positions, positions[-1]) if more else len(fresh_positions)
        if fresh:
            columns = {name: [*columns[name], *fresh[name][done:until]] for name in columns}
            positions = positions + fresh_positions[done:until]
        done = until
        order = sorted(range(len(positions)), key=positions.__getitem__)
        if positions:
            writer.add({name: [values[i] for i in order] for name, values in columns.items()})
