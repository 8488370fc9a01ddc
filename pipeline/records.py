"""Records: when and how often the rows of a table were tried. They lie beside the tables, in `<folder>/records/`, because
tables of equal rows are equal bytes, whenever they were made.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

import pyarrow as pa

from .storage import Folder
from .tables import TableName, parquet_bytes, read_parquet

SCHEMA = pa.schema([("key", pa.string()), ("attempts", pa.int32()), ("tried_at", pa.timestamp("s", "UTC"))])


def record_name(table: TableName) -> str:
    """Where a table's record lies."""
    folder, name = table.parquet.rsplit("/", 1)
    return f"{folder}/records/{name}"


def read_record(dataset: Folder, table: TableName) -> pa.Table:
    """The table's record: key, attempts, tried_at. Empty where there is none."""
    try:
        return read_parquet(dataset, record_name(table)).cast(SCHEMA)  # parquet has no seconds, only milliseconds
    except FileNotFoundError:
        return SCHEMA.empty_table()


def write_record(
    dataset: Folder, table: TableName, earlier: Sequence[TableName], keys: Sequence[str], tried: Collection[str]
) -> None:
    """Publishes the record of `table`: of the rows `tried` now one attempt more than in the earlier tables' records."""
    known: dict[str, tuple[int, int]] = {}
    for other in earlier:
        columns = read_record(dataset, other).cast(pa.schema([*list(SCHEMA)[:2], ("tried_at", pa.int64())]))
        for row in columns.to_pylist():
            known[row["key"]] = max(known.get(row["key"], (0, 0)), (row["attempts"], row["tried_at"]))
    now, fresh = int(time.time()), set(tried)
    rows = [(known.get(key, (0, now))[0] + 1, now) if key in fresh else known.get(key, (1, now)) for key in keys]
    _publish(dataset, table, keys, [a for a, _ in rows], [t for _, t in rows])


def write_first_record(dataset: Folder, table: TableName, keys: Sequence[str], tried_at: Sequence[int]) -> None:
    """Publishes the record of rows that were tried once each, elsewhere, at these Unix times."""
    _publish(dataset, table, keys, [1] * len(keys), tried_at)


def _publish(
    dataset: Folder, table: TableName, keys: Sequence[str], attempts: Sequence[int], tried_at: Sequence[int]
) -> None:
    columns = pa.table({"key": keys, "attempts": attempts, "tried_at": tried_at})
    dataset.write(record_name(table), parquet_bytes(columns.cast(SCHEMA)))
