"""Tables: what a stage wrote for a partition. One parquet file, a row for every sample it was given; bytes in a tar beside.

`<stage>-<config id>/<partition>.<input id>.<content id>.<rows>-<kept>-<transient>[.<tar id>].parquet` holds key, status, reason,
transient (whether another try may help), made_from (a digest of the values this row was made from) and the stage's
columns; for each payload also where its bytes lie in the tar beside, and their digest. The parquet file is published last,
so what it speaks of is there. The counts are in the name so that a plan opens no file.

A tar is called `<partition>.<tar id>.tar`, by what it holds. So a table that is made anew, because rows changed that have
nothing in the tar, leaves the tar as it is: several tables may name the same one.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .fingerprint import digest_of
from .shards import VIEWS, ShardWriter
from .stage import Stage
from .storage import Aside, Folder

COMMON = pa.schema(
    [
        ("key", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("transient", pa.bool_()),
        ("made_from", pa.string()),
    ]
)
STAGE_FOLDER = re.compile(r"(views/)?[^/]+-[0-9a-f]{12}")
_COUNTS = re.compile(r"\d+-\d+-\d+")
_TAR = re.compile(r"[^.]+\.[0-9a-f]{16}\.tar")


@dataclass(frozen=True, kw_only=True)
class TableName:
    """A table's place in the dataset folder, which says all that the plan needs to know of it."""

    folder: str
    partition: str
    input_id: str
    content_id: str
    rows: int
    kept: int
    transient: int
    """Rows that failed and may do better in another try."""
    tar_id: str = ""
    """Digest of what the tar holds; empty where the stage has no payload, and so no tar."""

    @property
    def parquet(self) -> str:
        counts = f"{self.rows}-{self.kept}-{self.transient}"
        stem = f"{self.folder}/{self.partition}.{self.input_id}.{self.content_id}.{counts}"
        return f"{stem}.{self.tar_id}.parquet" if self.tar_id else f"{stem}.parquet"

    @property
    def tar(self) -> str:
        return f"{self.folder}/{self.partition}.{self.tar_id}.tar"

    @classmethod
    def parse(cls, folder: str, name: str) -> TableName | None:
        """The table that a file name speaks of; None for other files."""
        parts = name.split(".")
        if len(parts) not in (5, 6) or parts[-1] != "parquet" or not _COUNTS.fullmatch(parts[3]):
            return None
        rows, kept, transient = map(int, parts[3].split("-"))
        return cls(
            folder=folder,
            partition=parts[0],
            input_id=parts[1],
            content_id=parts[2],
            rows=rows,
            kept=kept,
            transient=transient,
            tar_id=parts[4] if len(parts) == 6 else "",
        )


def tar_partition(name: str) -> str | None:
    """The partition of a table whose tar is called so; None for other files."""
    return name.split(".")[0] if _TAR.fullmatch(name) else None


def tar_id(rows: pa.Table, payloads: Sequence[str]) -> str:
    """The digest of the members that a table's rows have in its tar, whose bytes follow from them."""
    digests = [rows.column(f"{name}_sha256").to_pylist() for name in payloads]
    members = (row for row in zip(rows.column("key").to_pylist(), *digests, strict=True) if any(row[1:]))
    return digest_of(*payloads, *(part or "" for row in members for part in row))


def stage_folders(dataset: Folder) -> list[str]:
    """The folders that hold stages' tables, whatever recipe or setting they are of."""
    folders = [*dataset.folders(""), *(f"{VIEWS}/{name}" for name in dataset.folders(VIEWS))]
    return [folder for folder in folders if STAGE_FOLDER.fullmatch(folder)]


def list_tables(dataset: Folder, folder: str, *, with_tar: bool) -> dict[str, list[TableName]]:
    """The tables in a stage's folder by partition; `with_tar`: only those whose tar is there too.

    The best comes first: the one with the fewest rows that another try may help, so that a retry takes its elder's
    place; then by content id, so that of two builders' tables all readers pick the same one.
    """
    names = dataset.list(folder)
    there = set(names) if with_tar else set()
    found: dict[str, list[TableName]] = {}
    for name in names:
        table = TableName.parse(folder, name)
        if table and (not with_tar or table.tar.rsplit("/", 1)[1] in there):
            found.setdefault(table.partition, []).append(table)
    for tables in found.values():
        tables.sort(key=lambda t: (t.transient, t.content_id))
    return found


def schema_of(stage: Stage) -> pa.Schema:
    """The columns of the stage's tables."""
    fields = [*COMMON, *stage.writes]
    for name in stage.payload:
        fields += [pa.field(f"{name}_offset", pa.int64()), pa.field(f"{name}_size", pa.int64())]
        fields += [pa.field(f"{name}_sha256", pa.string())]
    return pa.schema(fields)


def parquet_bytes(table: pa.Table) -> bytes:
    """Parquet with fixed settings: equal tables give equal bytes."""
    out = io.BytesIO()
    pq.write_table(
        table.replace_schema_metadata(None), out, compression="zstd", row_group_size=16384, store_schema=True
    )
    return out.getvalue()


class TableWriter:
    """Collects a table's rows in batches; payload bytes go straight to disk, so memory stays flat in their size."""

    def __init__(self, stage: Stage, tar: Aside | None, tar_id: str = "") -> None:
        """`tar` is written to; or there is a tar already, `tar_id`, and the rows say where in it their bytes lie."""
        self._stage, self._tar, self._tar_id = stage, tar, tar_id
        self._parts: list[pa.Table] = []
        self._schema = schema_of(stage)
        self._shard = ShardWriter(tar.path) if tar else None
        self._finished: tuple[TableName, bytes] | None = None

    def add(self, columns: Mapping[str, Sequence[Any]]) -> None:
        """Appends rows: every column of the schema, and for each payload its bytes (None where a row has none)."""
        table = {name: values for name, values in columns.items() if name not in self._stage.payload}
        for name in self._stage.payload:
            table[f"{name}_sha256"] = [None if p is None else hashlib.sha256(p).hexdigest() for p in columns[name]]
        if self._shard:
            extensions = self._stage.payload.values()
            for key, *members in zip(columns["key"], *(columns[n] for n in self._stage.payload), strict=True):
                there = {e: data for e, data in zip(extensions, members, strict=True) if data is not None}
                if there:
                    self._shard.write(key, there)
        fields = [field for field in self._schema if field.name in table]
        self._parts.append(pa.Table.from_pydict(table, schema=pa.schema(fields)))

    def take(self, rows: pa.Table) -> None:
        """Appends rows of an earlier table whose bytes stay where they are."""
        self._parts.append(rows.select(self._schema.names))

    def finish(self, partition: str, input_id: str) -> TableName:
        """Ends the table and returns its name, under which nothing lies yet."""
        table = pa.concat_tables(self._parts) if self._parts else self._schema.empty_table()
        places = self._shard.close() if self._shard else {}
        if self._shard and self._parts:
            table = self._with_places(table, places)
        data = parquet_bytes(table.select(self._schema.names).combine_chunks())
        # The table holds the digest of every payload, so its own digest covers the tar.
        name = TableName(
            folder=self._stage.folder,
            partition=partition,
            input_id=input_id,
            content_id=digest_of(data),
            rows=table.num_rows,
            kept=len(kept_keys(table)),
            transient=pc.sum(table.column("transient")).as_py() or 0,
            tar_id=tar_id(table, list(self._stage.payload)) if self._tar else self._tar_id,
        )
        self._finished = name, data
        return name

    def publish(self, dataset: Folder) -> None:
        """Publishes the tar, unless it is there, then the table."""
        assert self._finished, "finish() comes first"
        name, data = self._finished
        is_there = not self._tar or dataset.exists(name.tar)
        if self._tar and not is_there:
            self._tar.publish(name.tar)
        dataset.write(name.parquet, data)
        if self._tar and is_there and not dataset.exists(name.tar):  # it was garbage to somebody until now
            self._tar.publish(name.tar)

    def _with_places(self, table: pa.Table, places: Mapping[str, Mapping[str, tuple[int, int]]]) -> pa.Table:
        """Adds where each payload lies: `places` gives offset and size by key and extension."""
        keys = table.column("key").to_pylist()
        for name, extension in self._stage.payload.items():
            spots = [places.get(key, {}).get(extension, (None, None)) for key in keys]
            table = table.append_column(f"{name}_offset", pa.array([s[0] for s in spots], pa.int64()))
            table = table.append_column(f"{name}_size", pa.array([s[1] for s in spots], pa.int64()))
        return table


@contextmanager
def writing_table(dataset: Folder, stage: Stage, tar_id: str = "") -> Iterator[TableWriter]:
    """A writer for one table of the stage, beside a tar that is there already if `tar_id` is given; nothing is left behind
    unless it is published.
    """
    if not stage.payload or tar_id:
        yield TableWriter(stage, None, tar_id)
    else:
        with dataset.writing(stage.folder) as aside:
            yield TableWriter(stage, aside)


def read_table(dataset: Folder, name: TableName, columns: Sequence[str] | None = None) -> pa.Table:
    """The table, or some of its columns."""
    return read_parquet(dataset, name.parquet, columns)


def read_parquet(dataset: Folder, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A parquet file of the dataset folder; only the bytes of the wanted columns are read."""
    try:
        if columns is None:
            # Not BytesIO: a process that ends soon after Arrow's threads asked a Python file can abort.
            return pq.ParquetFile(pa.BufferReader(dataset.read(name))).read()
        with pa.OSFile(dataset.path(name)) if dataset.is_local else dataset.open(name) as source:
            return pq.ParquetFile(source, pre_buffer=True).read(columns=list(columns))
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and (error.errno or type(error) is not OSError):
            raise  # it could not be asked for: that says nothing of the file
        raise ValueError(
            f"{dataset.url}/{name} is damaged ({error}): delete it, and the next build makes it again"
        ) from None


def read_payloads(dataset: Folder, name: TableName, rows: pa.Table, column: str) -> list[bytes]:
    """The payload bytes of some rows of a table, in their order; `rows` has the columns that place them."""
    offsets, sizes = (rows.column(f"{column}_{part}").to_pylist() for part in ("offset", "size"))
    if not offsets:
        return []
    found = dataset.read_ranges(name.tar, list(zip(offsets, sizes, strict=True)))
    if [len(data) for data in found] != sizes:
        there = f"{dataset.url}/{name.tar}"
        raise ValueError(f"{there} is cut: delete it, and the next build makes it again")
    return list(found)


def kept_keys(table: pa.Table) -> pa.ChunkedArray:
    """Keys of the rows that go on."""
    return table.filter(pc.equal(table.column("status"), "kept")).column("key")
