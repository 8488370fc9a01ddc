"""Source tables → partitions: every URL that no partition holds yet joins a new one; what is there is never re-cut.

`sources/<digest>.json` says of a source what became of its rows and which partitions are its own; the digest is of the
files' bytes and how they are read. `sources/<spec id>.latest.json` says which digest a source had last, and the sizes and
times of its files, so that one that did not change is not read again. `sources/absent/` holds, by partition, the keys
that a source does not list, or no longer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.fingerprint import digest_of
from pipeline.partitions import SOURCES, Partition, list_partitions, mark_format, partition_name
from pipeline.storage import Folder
from pipeline.tables import parquet_bytes, read_parquet
from pipeline.tombstones import Tombstones, read_tombstones

from .listing import Listing, new_listing
from .source import Source, read_source


def ingest(dataset: Folder, source: Source) -> list[Partition]:
    """Makes the partitions that are missing and returns the source's own, in order. Raises ValueError or FileNotFoundError
    in one line where the source is wrong; then nothing is written.
    """
    look = _look(dataset, source)
    partitions = look.partitions
    if partitions is None:
        with new_listing() as listing:
            partitions = _settle(dataset, source, look, listing, _list(source, listing))
    if not look.is_latest:
        latest = {"digest": look.digest, "files": look.files}
        dataset.write(_latest_name(source), json.dumps(latest, indent=1).encode())
    return partitions


def preview(dataset: Folder, source: Source) -> list[Partition]:
    """What `ingest` would return; writes nothing. Partitions that are not yet made have no content id."""
    look = _look(dataset, source)
    if look.partitions is not None:
        return look.partitions
    with new_listing() as listing:
        listed = _list(source, listing)
        there = list_partitions(dataset)
        listing.hold_against(dataset, there)
        tombstones = read_tombstones(dataset)
        wanted, _ = listing.new_rows(tombstones.keys)
        whole, some = listing.absent(there)
        absent = {spot: _absent_name(there[spot], keys) for spot, keys in some}
        born = _born(source, listing, listed.schema, wanted, tombstones, there)
        return [*_still_listed(there, whole, absent), *(replace(partition, content_id="") for partition, _ in born)]


def ingested(dataset: Folder, source: Source) -> list[Partition]:
    """What the last `ingest` of this source returned, without a look at the source, which may be gone; all partitions if
    there is no record of it.
    """
    latest = _read_json(dataset, _latest_name(source))
    record = latest and _read_json(dataset, _record_name(latest["digest"]))
    return _recorded(dataset, record)[0] if record else list_partitions(dataset)


@dataclass(frozen=True, kw_only=True)
class _Look:
    """A source's files as they are now, and what the dataset knows of them."""

    digest: str
    files: list[list[str | int]]
    """Name, size in bytes and time of the last change in nanoseconds of each."""
    is_latest: bool
    """Whether the dataset has just this on record as the source's latest state."""
    partitions: list[Partition] | None
    """None where the source must be read."""


def _look(dataset: Folder, source: Source) -> _Look:
    files = _stats(source)
    latest = _read_json(dataset, _latest_name(source))
    is_latest = latest is not None and latest["files"] == files
    digest = (
        latest["digest"] if latest and is_latest else digest_of(*_spelling(source), *map(_file_digest, source.files))
    )
    record = _read_json(dataset, _record_name(digest))
    partitions, complete = _recorded(dataset, record) if record else ([], False)
    return _Look(digest=digest, files=files, is_latest=is_latest, partitions=partitions if complete else None)


def _recorded(dataset: Folder, record: Mapping[str, Any]) -> tuple[list[Partition], bool]:
    """The partitions that a record speaks of, and whether all are there. One that lost all its rows is no longer told."""
    there = {p.name: p for p in list_partitions(dataset)}
    absent: dict[str, str] = record["partitions"]
    found = [replace(there[name], absent=absent[name]) for name in absent if name in there and there[name].rows]
    return found, absent.keys() <= there.keys()


@dataclass(frozen=True, kw_only=True)
class _Listed:
    """What a first reading of the whole source found."""

    rows: int
    skipped: int
    keys: int
    schema: pa.Schema


def _list(source: Source, listing: Listing) -> _Listed:
    """Reads the source once: whatever is wrong with it shows here, before anything is written."""
    rows = skipped = 0
    for batch in read_source(source):
        urls = batch.column("url")
        listing.add(urls, rows)
        rows += len(urls)
        skipped += pc.sum(pc.equal(urls, "")).as_py() or 0
    return _Listed(rows=rows, skipped=skipped, keys=listing.finish(), schema=batch.schema)


def _settle(dataset: Folder, source: Source, look: _Look, listing: Listing, listed: _Listed) -> list[Partition]:
    """Publishes what is missing, and the record of it. Goes round again while other builders publish, or samples are taken
    down, at the same time.
    """
    tombstones = read_tombstones(dataset)
    born: set[str] = set()
    while True:
        _check_unchanged(source, look)
        there = list_partitions(dataset)
        try:
            listing.hold_against(dataset, there)
        except FileNotFoundError:
            if list_partitions(dataset) == there:
                raise
            continue  # another builder has just put a smaller one in its place
        if _part_repeated(dataset, there, listing):
            continue
        wanted, taken_down = listing.new_rows(tombstones.keys)
        made: list[Partition] = []
        for partition, data in _born(source, listing, listed.schema, wanted, tombstones, there):
            if not made:
                mark_format(dataset)
            dataset.write(partition.parquet, data)
            made.append(partition)
        born.update(p.name for p in made)
        # After the partitions: a takedown writes tombstones first, so one that saw none of these is seen here.
        before, tombstones = tombstones, read_tombstones(dataset)
        if tombstones != before:
            _take_out(dataset, born, tombstones)
            continue
        whole, some = listing.absent(there)
        absent = {spot: _publish_absent(dataset, there[spot], keys) for spot, keys in some}
        partitions = [*_still_listed(there, whole, absent), *made]
        record = {
            "rows": listed.rows,
            "new": sum(p.rows for p in partitions if p.name in born),
            "skipped": listed.skipped,
            "duplicates": listed.rows - listed.skipped - listed.keys,
            "taken_down": taken_down + len(wanted) - sum(p.rows for p in made),
            "files": [name for name, _, _ in look.files],
            "partitions": {p.name: p.absent for p in partitions},
        }
        _check_unchanged(source, look)
        dataset.write(_record_name(look.digest), json.dumps(record, indent=1).encode())
        if list_partitions(dataset) == [*there, *made]:
            return partitions


def _part_repeated(dataset: Folder, there: Sequence[Partition], listing: Listing) -> bool:
    """Takes out of each partition the keys that an earlier one has too, which two builders at once can bring about; tells
    whether there were any. Whoever sees them does it, and all come to the same bytes.
    """
    found = False
    for spot, keys in listing.repeated():
        if not found:
            # First, so that no death on the way leaves a record that seeks these rows where they no longer are.
            for name in dataset.list(SOURCES):
                if name.endswith(".json") and not name.endswith(".latest.json"):
                    dataset.remove(f"{SOURCES}/{name}")
        found = True
        _shrink(dataset, there[spot], partial(_without, keys=keys))
    return found


def _without(rows: pa.Table, keys: pa.Array) -> pa.ChunkedArray:
    """Which rows have none of the keys."""
    return pc.invert(pc.is_in(rows.column("key"), keys))


def _take_out(dataset: Folder, names: set[str], tombstones: Tombstones) -> None:
    """Takes out of the partitions of these names what was taken down while they were published."""

    def stays(rows: pa.Table) -> pa.Array:
        pairs = zip(rows.column("key").to_pylist(), rows.column("url").to_pylist(), strict=True)
        return pa.array([k not in tombstones.keys and not tombstones.refuses_url(u) for k, u in pairs], pa.bool_())

    for partition in list_partitions(dataset):
        if partition.name in names:
            _shrink(dataset, partition, stays)


def _shrink(dataset: Folder, old: Partition, stays: Callable[[pa.Table], pa.Array | pa.ChunkedArray]) -> None:
    """Puts a partition of the rows that stay in the place of this one."""
    try:
        rows = read_parquet(dataset, old.parquet)
    except FileNotFoundError:
        return  # another builder, or the takedown, did it
    left = rows.filter(stays(rows)).combine_chunks()
    if left.num_rows < rows.num_rows:
        data = parquet_bytes(left)
        dataset.write(replace(old, rows=left.num_rows, content_id=digest_of(data)).parquet, data)
        dataset.remove(old.parquet)


def _born(
    source: Source,
    listing: Listing,
    schema: pa.Schema,
    wanted: np.ndarray,
    tombstones: Tombstones,
    there: Sequence[Partition],
) -> Iterator[tuple[Partition, bytes]]:
    """The partitions that the wanted rows make, with their files, to follow those that are there."""
    number = there[-1].number + 1 if there else 0
    for rows in _cut(_fresh_rows(source, listing, schema, wanted, tombstones), source.partition_size):
        data = parquet_bytes(rows.combine_chunks())
        content_id = digest_of(data)
        name = partition_name(number, content_id)
        yield Partition(name=name, rows=rows.num_rows, content_id=content_id), data
        number += 1


def _cut(batches: Iterator[pa.Table], size: int) -> Iterator[pa.Table]:
    """The same rows in tables of `size`, the last one smaller."""
    pending: list[pa.Table] = []
    rows = 0
    for batch in batches:
        pending.append(batch)
        rows += batch.num_rows
        if rows >= size:
            together = pa.concat_tables(pending)
            whole = rows - rows % size
            yield from (together.slice(start, size) for start in range(0, whole, size))
            pending, rows = [together.slice(whole)], rows - whole
    if rows:
        yield pa.concat_tables(pending)


def _fresh_rows(
    source: Source, listing: Listing, schema: pa.Schema, wanted: np.ndarray, tombstones: Tombstones
) -> Iterator[pa.Table]:
    """Second reading: the rows of these numbers, with their keys, less those of domains that were taken down."""
    if not len(wanted):
        return
    row = done = 0
    for batch in read_source(source, schema):
        end = int(np.searchsorted(wanted, row + batch.num_rows))
        rows = batch.take(pa.array(wanted[done:end] - row))
        if tombstones.domains:
            rows = rows.filter(
                pa.array([not tombstones.refuses_url(url) for url in rows.column("url").to_pylist()], pa.bool_())
            )
        if rows.num_rows:
            yield rows.add_column(0, "key", listing.keys_of(rows.column("url")))
        row, done = row + batch.num_rows, end
        if done == len(wanted):
            return


def _still_listed(there: Sequence[Partition], whole: set[int], absent: Mapping[int, str]) -> list[Partition]:
    """The partitions of which the source lists anything, each with where its absent keys lie."""
    return [replace(p, absent=absent.get(spot, "")) for spot, p in enumerate(there) if spot not in whole]


def _absent_name(partition: Partition, keys: pa.Array) -> str:
    return f"{SOURCES}/absent/{partition.name}.{digest_of(chr(10).join(keys.to_pylist()))}.parquet"


def _publish_absent(dataset: Folder, partition: Partition, keys: pa.Array) -> str:
    name = _absent_name(partition, keys)
    if not dataset.exists(name):
        dataset.write(name, parquet_bytes(pa.table({"key": keys})))
    return name


def _spelling(source: Source) -> tuple[str, str, str]:
    """How the files are read, as far as it changes what is read."""
    return source.url_column, source.text_column or "", source.empty_urls


def _latest_name(source: Source) -> str:
    return f"{SOURCES}/{digest_of(source.path, *_spelling(source))}.latest.json"


def _record_name(digest: str) -> str:
    return f"{SOURCES}/{digest}.json"


def _read_json(dataset: Folder, name: str) -> dict[str, Any] | None:
    try:
        return json.loads(dataset.read(name))
    except (FileNotFoundError, ValueError):  # a damaged note only saves no work: the source is read again
        return None


def _stats(source: Source) -> list[list[str | int]]:
    stats = [(path.name, path.stat()) for path in source.files]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def _check_unchanged(source: Source, look: _Look) -> None:
    if _stats(source) != look.files:
        raise ValueError(f"source {source.path} was changed while it was read: run it again when it is complete")


def _file_digest(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
