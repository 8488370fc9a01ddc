"""The rows a stage is given for a partition: gathered from the tables before it, handed out in batches."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc

from .fingerprint import row_digests
from .plan import Ticket, depends_on
from .sample import LISTED, MEMBERSHIP
from .stage import Stage
from .storage import Folder
from .tables import TableName, kept_keys, read_parquet, read_payloads, read_table


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows for one call of `process`."""

    table: pa.Table
    made_from: list[str]
    positions: list[int]
    """Of the rows among all that the stage is given; rising."""


@dataclass(frozen=True, kw_only=True)
class Given:
    """The rows a stage is given: `rows` has key, the columns it reads and, for a payload, where its bytes lie."""

    dataset: Folder
    rows: pa.Table
    made_from: list[str]
    positions: list[int]
    columns: tuple[str, ...]
    payload: tuple[str, TableName] | None
    """The payload column that the stage reads, and the table beside whose tar it lies."""
    absent: str = ""
    """Where the keys lie that the source does not list."""

    def without(self, positions: Collection[int]) -> Given:
        """The rows at other positions."""
        return self._take([spot for spot, p in enumerate(self.positions) if p not in positions]) if positions else self

    def without_keys(self, keys: Collection[str]) -> Given:
        """The rows of other keys."""
        return (
            self._take([s for s, k in enumerate(self.rows.column("key").to_pylist()) if k not in keys])
            if keys
            else self
        )

    def only(self, keys: Collection[str]) -> Given:
        """The rows of these keys."""
        wanted = set(keys)
        return self._take([spot for spot, k in enumerate(self.rows.column("key").to_pylist()) if k in wanted])

    def _take(self, spots: list[int]) -> Given:
        rows = self.rows.take(pa.array(spots, pa.int64()))
        return replace(
            self,
            rows=rows,
            made_from=[self.made_from[s] for s in spots],
            positions=[self.positions[s] for s in spots],
        )

    def batches(self, size: int) -> Iterator[Batch]:
        """The rows in batches; the next batch's payloads are read while the caller works on the present one."""
        starts = range(0, self.rows.num_rows, size)
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(self._batch, 0, size) if len(starts) else None
            for start in starts:
                assert ahead is not None
                batch = ahead.result()
                if start + size < self.rows.num_rows:
                    ahead = reader.submit(self._batch, start + size, size)
                yield batch

    def _batch(self, start: int, size: int) -> Batch:
        rows = self.rows.slice(start, size)
        table = rows.select(["key", *(c for c in self.columns if c in rows.column_names and c != "key")])
        if self.payload:
            column, beside = self.payload
            table = table.append_column(column, [read_payloads(self.dataset, beside, rows, column)])
        window = slice(start, start + size)
        return Batch(table=table, made_from=self.made_from[window], positions=self.positions[window])


def gather(dataset: Folder, stages: Sequence[Stage], index: int, ticket: Ticket, *, only_shown: bool = False) -> Given:
    """The rows that go into stage `index`, in the partition's order: those that every stage before it kept which may drop
    rows, and of which there is all that it reads (a stage that drops none may have had to set one aside).

    only_shown: nothing will be written of them, so what they are made from is left empty.
    """
    stage = stages[index]
    needed = depends_on(stages, index)
    own = [c for c in MEMBERSHIP if c == "key" or c in stage.reads]
    rows = read_parquet(dataset, ticket.partition.parquet, [*own, *stage.of_source])
    for name in stage.of_source:
        if name not in rows.column_names:
            rows = rows.append_column(name, pa.nulls(rows.num_rows))
    payload: tuple[str, TableName] | None = None
    gates = [s for s in needed if s.drops]
    if gates:
        kept = kept_keys(read_table(dataset, ticket.tables[gates[-1].name], ["key", "status"]))
        rows = rows.filter(pc.is_in(rows.column("key"), value_set=kept.combine_chunks()))
    for provider in needed:
        extra = [n for n in provider.writes.names if n in stage.reads]
        for column in set(provider.payload) & set(stage.reads):
            payload = (column, ticket.tables[provider.name])
            extra += [f"{column}_{part}" for part in ("offset", "size", "sha256")]
        if extra:
            found = read_table(dataset, ticket.tables[provider.name], ["key", "status", *extra])
            if not provider.drops:
                rows = rows.filter(pc.is_in(rows.column("key"), value_set=kept_keys(found).combine_chunks()))
            rows = _join(rows, found, extra)
    if LISTED in stage.reads:
        rows = rows.append_column(LISTED, listed(dataset, rows.column("key"), ticket.partition.absent))
    digested = {*stage.reads, f"{payload[0]}_sha256" if payload else ""}
    values = rows.select(sorted(n for n in rows.column_names if n in digested))
    digests = values.num_columns and not only_shown
    made_from = row_digests(values) if digests else [""] * rows.num_rows
    return Given(
        dataset=dataset,
        rows=rows,
        made_from=made_from,
        positions=list(range(rows.num_rows)),
        columns=stage.reads,
        payload=payload,
        absent=ticket.partition.absent,
    )


def listed(dataset: Folder, keys: pa.ChunkedArray, absent: str) -> pa.ChunkedArray:
    """Whether the source lists each key; `absent` is the file of those of the partition that it does not."""
    gone = read_parquet(dataset, absent).column("key").combine_chunks() if absent else pa.array([], pa.string())
    return pc.invert(pc.is_in(keys, value_set=gone))


def _join(rows: pa.Table, other: pa.Table, columns: Sequence[str]) -> pa.Table:
    spots = pc.index_in(rows.column("key"), value_set=other.column("key").combine_chunks())
    for name in columns:
        if name in rows.column_names:
            rows = rows.drop_columns([name])
        rows = rows.append_column(name, other.column(name).take(spots))
    return rows
