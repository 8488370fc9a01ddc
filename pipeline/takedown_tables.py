"""Takes rows out of the files of a partition: its own, and a table with its tar and its record.

What is published is what a build that was never given these rows would have written. What it replaces is only named, so
that the caller can first let go whatever points to it.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from .fingerprint import digest_of
from .partitions import Partition
from .records import read_record, record_name
from .shards import ShardWriter
from .storage import Aside, Folder
from .tables import TableName, kept_keys, parquet_bytes, read_parquet, read_table, tar_id

PIECE = 1 << 23  # bytes of a tar that are read at a time: on an object store each read is a request


@dataclass(frozen=True, kw_only=True)
class Removed:
    """What went out of a folder; in a dry run, what would go."""

    files: int = 0
    """Files that were written anew, and files that went whole."""
    rows: int = 0
    bytes: int = 0
    """Of these rows in memory, and of their pictures and other members in tars."""

    def __add__(self, other: Removed) -> Removed:
        return Removed(files=self.files + other.files, rows=self.rows + other.rows, bytes=self.bytes + other.bytes)


@dataclass(frozen=True, kw_only=True)
class Rewritten:
    """One partition file or table without the rows."""

    removed: Removed
    stale: tuple[str, ...] = ()
    """Files that are to be removed now, in this order."""
    tar: str = ""
    """The new tar; empty where there is none."""


@contextmanager
def reading_tar(dataset: Folder, name: str) -> Iterator[tarfile.TarFile]:
    """The tar, to be read from its beginning on. Not as a stream of tarfile's: that copies its buffer for every member."""
    with dataset.open(name) as file:
        whole: Any = file if dataset.is_local else io.BufferedReader(file, PIECE)  # type: ignore[arg-type, type-var]
        with tarfile.open(fileobj=whole, mode="r:") as tar:
            yield tar


def values_of(column: pa.ChunkedArray) -> Iterator[Any]:
    """The column's values; a chunk of them at a time in memory, for a manifest has millions."""
    for chunk in column.chunks:
        yield from chunk.to_pylist()


def part_rows(table: pa.Table, forgotten: frozenset[str]) -> tuple[pa.Table, pa.Table]:
    """The rows that stay and those that go."""
    # A set, not Arrow's `is_in`: that would hash all that was ever forgotten for each of the tables.
    stays = pa.array([key not in forgotten for key in values_of(table.column("key"))], pa.bool_())
    return table.filter(stays), table.filter(pc.invert(stays))


def count_removed(gone: pa.Table, files: int) -> Removed:
    """The rows that go out of so many files."""
    members = [pc.sum(gone.column(f"{name}_size")).as_py() or 0 for name in payloads_of(gone)]
    return Removed(files=files, rows=gone.num_rows, bytes=gone.nbytes + sum(members))


def payloads_of(table: pa.Table) -> list[str]:
    """The payload columns whose bytes lie in the tar beside the table."""
    names = set(table.column_names)
    bases = [name.removesuffix("_sha256") for name in table.column_names if name.endswith("_sha256")]
    return [base for base in bases if {f"{base}_offset", f"{base}_size"} <= names]


def rewrite_partition(dataset: Folder, partition: Partition, forgotten: frozenset[str], *, dry_run: bool) -> Rewritten:
    """The partition's file without these rows. Without any row it stays as an empty file: `ingest` then knows that it was
    there, and a later takedown looks for what an earlier one may have left in its tables.
    """
    stays, gone = part_rows(read_parquet(dataset, partition.parquet), forgotten)
    if not gone.num_rows:
        return Rewritten(removed=Removed())
    data = parquet_bytes(stays.combine_chunks())
    if not dry_run:
        dataset.write(replace(partition, rows=stays.num_rows, content_id=digest_of(data)).parquet, data)
    return Rewritten(removed=count_removed(gone, 1), stale=(partition.parquet,))


def rewrite_table(
    dataset: Folder, table: TableName, forgotten: frozenset[str], *, has_tar: bool, dry_run: bool
) -> Rewritten:
    """A stage's table without these rows: tar, record and parquet file, which is published last. `has_tar`: whether a tar
    lies beside it. One that has lost its tar is as good as missing, and goes whole.
    """
    if forgotten.isdisjoint(read_table(dataset, table, ["key"]).column("key").to_pylist()):
        return Rewritten(removed=Removed())
    rows = read_table(dataset, table)
    stays, gone = part_rows(rows, forgotten)
    record = read_record(dataset, table)
    stale = (table.parquet, *((table.tar,) if has_tar else ()), *((record_name(table),) if record.num_rows else ()))
    removed = count_removed(gone, len(stale))
    if dry_run or (payloads_of(rows) and not has_tar):
        return Rewritten(removed=removed, stale=stale)
    if not has_tar:
        name, data = _named(table, stays)
        _publish(dataset, name, data, record, forgotten)
        return Rewritten(removed=removed, stale=stale)
    with dataset.writing(table.folder) as aside:
        name, data = _named(table, _moved(dataset, table, stays, _copy_tar(dataset, table, aside, forgotten)))
        aside.publish(name.tar)
        _publish(dataset, name, data, record, forgotten)
    # Where none of these rows had anything in the tar, it is what it was.
    return Rewritten(removed=removed, stale=tuple(file for file in stale if file != name.tar), tar=name.tar)


def _named(old: TableName, rows: pa.Table) -> tuple[TableName, bytes]:
    """The name of the table that now has these rows, and its file."""
    declared = pa.schema([field.with_type(_declared(field.type)) for field in rows.schema])
    data = parquet_bytes(rows.cast(declared).combine_chunks())
    payloads = payloads_of(rows)
    name = replace(
        old,
        content_id=digest_of(data),
        rows=rows.num_rows,
        kept=len(kept_keys(rows)),
        transient=pc.sum(rows.column("transient")).as_py() or 0,
        tar_id=tar_id(rows, payloads) if payloads else "",
    )
    return name, data


def _declared(kind: pa.DataType) -> pa.DataType:
    """The type as stages declare it: what is read back calls a list's values `element`, where Arrow says `item`."""
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_declared(kind.value_type), kind.list_size)
    return pa.list_(_declared(kind.value_type)) if pa.types.is_list(kind) else kind


def _publish(dataset: Folder, name: TableName, data: bytes, record: pa.Table, forgotten: frozenset[str]) -> None:
    if record.num_rows:
        dataset.write(record_name(name), parquet_bytes(part_rows(record, forgotten)[0].combine_chunks()))
    dataset.write(name.parquet, data)


def _copy_tar(dataset: Folder, table: TableName, aside: Aside, forgotten: frozenset[str]) -> dict[int, int]:
    """Writes the tar aside without the members of the samples that go, and tells where the others lay and lie now.

    One sample at a time: a partition's pictures together are gigabytes.
    """
    writer = ShardWriter(aside.path)
    old: dict[tuple[str, str], int] = {}
    key = ""
    members: dict[str, bytes] = {}
    try:
        with reading_tar(dataset, table.tar) as tar:
            for member in tar:
                owner, extension = member.name.split(".", 1)
                if owner in forgotten:
                    continue
                if owner != key and members:
                    writer.write(key, members)
                    members = {}
                content = tar.extractfile(member)
                assert content, "a shard holds files only"
                key, members[extension] = owner, content.read()
                old[owner, extension] = member.offset_data
        if members:
            writer.write(key, members)
    except tarfile.TarError as error:
        raise _damaged(dataset, table, str(error)) from None
    new = writer.close()
    return {offset: new[owner][extension][0] for (owner, extension), offset in old.items()}


def _moved(dataset: Folder, table: TableName, rows: pa.Table, places: dict[int, int]) -> pa.Table:
    """The rows with their payloads' new places."""
    for name in payloads_of(rows):
        column = f"{name}_offset"
        offsets = rows.column(column).to_pylist()
        if not places.keys() >= set(offsets) - {None}:
            raise _damaged(dataset, table, "it holds less than its table says")
        moved = pa.array([None if offset is None else places[offset] for offset in offsets], pa.int64())
        spot = rows.schema.get_field_index(column)
        rows = rows.set_column(spot, rows.schema.field(spot), moved)
    return rows


def _damaged(dataset: Folder, table: TableName, why: str) -> ValueError:
    return ValueError(f"{dataset.url}/{table.tar} is damaged ({why}): delete it, then run this again")
