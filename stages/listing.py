"""What a source lists, held against what the partitions hold: in a database that spills to disk, so memory stays flat."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipeline.partitions import Partition
from pipeline.sample import KEY_LENGTH
from pipeline.storage import Folder
from pipeline.tables import read_parquet

if TYPE_CHECKING:
    import duckdb

MEMORY = "1GB"  # of the database; what is more lies in a temporary folder
THREADS = 2
READERS = 8  # partitions that are read at a time: on an object store each waits for an answer
CHUNK = 64  # partitions whose keys are in memory at a time

# A key is 24 hexadecimal digits: 12 bytes, the most that duckdb holds in a row without a place elsewhere.
_SAMPLE_KEY = f"substr(sha256(url), 1, {KEY_LENGTH})"  # of pipeline.sample, in SQL


class Listing:
    """The source's keys, each with the first row that has it, and the partitions' keys. See `new_listing`."""

    def __init__(self, connection: duckdb.DuckDBPyConnection) -> None:
        self._connection = connection
        self._run("CREATE TABLE listed (key BLOB, row BIGINT)")

    def add(self, urls: pa.ChunkedArray, row: int) -> None:
        """Adds rows of the source, the first of which has this number; those without a URL do not count."""
        given = pa.table({"url": urls, "row": np.arange(row, row + len(urls))})
        self._insert(f"INSERT INTO listed SELECT unhex({_SAMPLE_KEY}), row FROM given WHERE url <> ''", given)

    def keys_of(self, urls: pa.ChunkedArray) -> pa.ChunkedArray:
        """The samples' keys, in order."""
        self._connection.register("given", pa.table({"url": urls}))
        found = self._connection.sql(f"SELECT {_SAMPLE_KEY} AS key FROM given").to_arrow_table()
        self._connection.unregister("given")
        return found.column("key")

    def finish(self) -> int:
        """Ends the adding; returns how many keys the source lists."""
        self._run("CREATE TABLE firsts AS SELECT key, min(row) AS row FROM listed GROUP BY key; DROP TABLE listed")
        return self._number("SELECT count(*) FROM firsts")

    def hold_against(self, dataset: Folder, partitions: Sequence[Partition]) -> None:
        """Reads the keys of all partitions, in place of those that were read before."""
        self._run("CREATE OR REPLACE TABLE known (key BLOB, spot INTEGER)")
        with ThreadPoolExecutor(READERS) as readers:
            for start in range(0, len(partitions), CHUNK):
                chunk = partitions[start : start + CHUNK]
                tables = readers.map(lambda p: read_parquet(dataset, p.parquet, ["key"]), chunk)
                keys = [t.append_column("spot", pa.repeat(start + n, t.num_rows)) for n, t in enumerate(tables)]
                self._insert("INSERT INTO known SELECT unhex(key), spot FROM given", pa.concat_tables(keys))

    def new_rows(self, taken_down: frozenset[str]) -> tuple[np.ndarray, int]:
        """The first row of every key that no partition holds, in the source's order, less the keys that were taken down;
        and how many of those there were.
        """
        self._run("CREATE OR REPLACE TABLE fresh AS FROM firsts ANTI JOIN known USING (key)")
        everything = self._number("SELECT count(*) FROM fresh")
        given = pa.table({"key": pa.array(sorted(taken_down), pa.string())})
        self._insert("DELETE FROM fresh WHERE key IN (SELECT unhex(key) FROM given)", given)
        rows = self._connection.execute("SELECT row FROM fresh ORDER BY row").fetchnumpy()["row"]
        self._run("DROP TABLE fresh")
        return np.asarray(rows), everything - len(rows)

    def repeated(self) -> Iterator[tuple[int, pa.Array]]:
        """For each partition (its place among those read) the keys that an earlier one has too."""
        self._run(
            "CREATE OR REPLACE TABLE first_places AS "
            "SELECT key, min(spot) AS first FROM known GROUP BY key HAVING count(*) > 1"
        )
        yield from self._by_partition("known JOIN first_places USING (key) WHERE spot > first")

    def absent(self, partitions: Sequence[Partition]) -> tuple[set[int], Iterator[tuple[int, pa.Array]]]:
        """The places of partitions of which the source lists no key, and for each of which it lists some the others."""
        self._run("CREATE OR REPLACE TABLE absent AS FROM known ANTI JOIN firsts USING (key)")
        counts = dict(self._connection.execute("SELECT spot, count(*) FROM absent GROUP BY spot").fetchall())
        whole = {spot for spot, partition in enumerate(partitions) if counts.get(spot, 0) == partition.rows}
        some = pa.table({"spot": pa.array(sorted(counts.keys() - whole), pa.int32())})
        self._insert("CREATE OR REPLACE TABLE some_absent AS FROM given", some)
        return whole, self._by_partition("absent SEMI JOIN some_absent USING (spot)")

    def _by_partition(self, relation: str) -> Iterator[tuple[int, pa.Array]]:
        """The keys of the relation, sorted, partition by partition."""
        query = f"SELECT spot, lower(hex(key)) AS key FROM {relation} ORDER BY spot, key"
        # A cursor of its own, because a connection does nothing else while a result is not read to its end.
        reader = self._connection.cursor().sql(query).to_arrow_reader(1 << 16)
        pieces = ((int(spot), piece) for batch in reader for spot, piece in _pieces(batch))
        for spot, group in groupby(pieces, key=lambda piece: piece[0]):
            yield spot, pa.concat_arrays([keys for _, keys in group])

    def _insert(self, statement: str, given: pa.Table) -> None:
        self._connection.register("given", given)
        self._run(statement)
        self._connection.unregister("given")

    def _run(self, statement: str) -> None:
        self._connection.execute(statement)

    def _number(self, query: str) -> int:
        return int(self._connection.execute(query).fetchall()[0][0])


def _pieces(batch: pa.RecordBatch) -> Iterator[tuple[int, pa.Array]]:
    """The runs of equal `spot` in a sorted batch, each with its keys."""
    spots = batch.column("spot").to_numpy()
    starts = [0, *(np.flatnonzero(np.diff(spots)) + 1).tolist()] if len(spots) else []
    for start, end in zip(starts, [*starts[1:], len(spots)]):
        yield spots[start], batch.column("key").slice(start, end - start)


@contextmanager
def new_listing(memory: str = MEMORY, threads: int = THREADS) -> Iterator[Listing]:
    """An empty listing. Its database, in memory up to `memory` and else in a temporary folder, is gone when the block ends."""
    import duckdb

    with tempfile.TemporaryDirectory(prefix="densebridge-listing-") as folder, duckdb.connect() as connection:
        connection.execute(f"SET temp_directory = '{folder}'; SET memory_limit = '{memory}'; SET threads = {threads}")
        connection.execute("SET enable_external_access = false")  # last: from then on the folder could not be set
        yield Listing(connection)
