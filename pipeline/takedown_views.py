"""Takes rows out of the manifests of views, so that the present version of each is right before anything is built."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .fingerprint import digest_of
from .manifest import SHARD, Manifest, is_shard_column, writing_manifest
from .shards import VIEWS, View, ViewInfo, publish_version, read_info
from .storage import Folder
from .tables import TableName, list_tables, read_table
from .takedown_tables import Removed, Rewritten, part_rows

PARTS = ("offset", "size", "crc32", "length")
"""What a manifest says of a member."""


def rewrite_views(
    dataset: Folder, forgotten: frozenset[str], stale: Collection[str], pool: Executor, *, dry_run: bool
) -> Rewritten:
    """Names a new version of every view whose manifest speaks of forgotten samples or of shards that go (`stale`), and
    tells which manifests are to be removed: those that no view names and that speak of such.
    """
    removed, going, named = Removed(), list[str](), set[str]()
    shards = _Shards(dataset, stale)
    for info in present_views(dataset):
        named.add(info.manifest)
        manifest = View(dataset, info).manifest
        gone = _count_gone(manifest, forgotten)
        if not gone.rows and shards.are_there(manifest):
            continue
        removed += gone
        going.append(info.manifest)
        if not dry_run:
            _publish_without(dataset, info, manifest, forgotten, shards, pool)
    for folder in dataset.folders(VIEWS):
        for name in manifests_in(dataset, f"{VIEWS}/{folder}"):
            if name not in named:
                manifest = Manifest(dataset, name)
                gone = _count_gone(manifest, forgotten)
                if gone.rows or not shards.are_there(manifest):
                    removed += gone
                    going.append(name)
    return Rewritten(removed=removed, stale=tuple(going))


def present_views(dataset: Folder) -> Iterator[ViewInfo]:
    """The present version of each view whose manifest is there. One of another format is made again by the next build."""
    for name in dataset.list(VIEWS):
        if name.endswith(".json"):
            info = read_info(dataset, f"{VIEWS}/{name}")
            if info and dataset.exists(info.manifest):
                yield info


def manifests_in(dataset: Folder, folder: str) -> list[str]:
    """The manifests of all versions that lie in a view's folder."""
    return [f"{folder}/{n}" for n in dataset.list(folder) if n.startswith("manifest-") and n.endswith(".parquet")]


def _count_gone(manifest: Manifest, forgotten: frozenset[str]) -> Removed:
    """What goes out of a manifest."""
    found = Removed(files=1)
    for rows in manifest.batches():
        gone = part_rows(rows, forgotten)[1]
        found += Removed(rows=gone.num_rows, bytes=gone.nbytes)
    return found


def _publish_without(
    dataset: Folder, old: ViewInfo, manifest: Manifest, forgotten: frozenset[str], shards: _Shards, pool: Executor
) -> None:
    """The version follows from what was and what is, so that whoever is interrupted and goes on comes to the same."""
    folder = old.manifest.rsplit("/", 1)[0]
    with writing_manifest(dataset, folder) as new:
        new.add(manifest.schema.empty_table())
        for rows in manifest.batches():
            for found in pool.map(partial(shards.follow, view=old.view), _runs(part_rows(rows, forgotten)[0])):
                new.add(found)
        new.close()
        version = digest_of(old.version, new.sha256)
        publish_version(dataset, replace(old, version=version, manifest=f"{folder}/manifest-{version}.parquet"), new)


class _Shards:
    """The shards of views, and of their companions, as they are once the stale ones are gone."""

    def __init__(self, dataset: Folder, stale: Collection[str]) -> None:
        self._dataset, self._stale = dataset, stale
        going = (TableName.parse(*name.rsplit("/", 1)) for name in stale)
        self._gone = {table.tar: table for table in going if table}
        self._folders: dict[str, _Staying] = {}

    def _in(self, folder: str) -> _Staying:
        if folder not in self._folders:
            found = list_tables(self._dataset, folder, with_tar=True).values()
            tables = [t for tables in found for t in tables if t.parquet not in self._stale]
            # The best of each input, as `list_tables` has it first.
            best = {(t.partition, t.input_id): t for t in reversed(tables)}
            self._folders[folder] = _Staying(tars=frozenset(t.tar for t in tables), best=best)
        return self._folders[folder]

    def _is_there(self, tar: str) -> bool:
        return tar in self._in(tar.rsplit("/", 1)[0]).tars

    def are_there(self, manifest: Manifest) -> bool:
        """Whether every shard that the manifest names is there."""
        return all(map(self._is_there, manifest.shards))

    def follow(self, rows: pa.Table, view: str) -> pa.Table:
        """Rows of one partition with shards and places as they are now. Those of a shard that has no successor are left out,
        and so is a companion's member: its table was lost earlier, and the next build makes both again.
        """
        members = [n.removesuffix(f"_{SHARD}") for n in rows.column_names if n != SHARD and is_shard_column(n)]
        added = {f"{member}_{part}" for member in members for part in (SHARD, *PARTS)}
        rows = self._moved(rows, SHARD, [n for n in rows.column_names if n not in added], view)
        for member in members:
            own = [f"{member}_{part}" for part in (SHARD, *PARTS) if f"{member}_{part}" in rows.column_names]
            rows = self._moved(rows, f"{member}_{SHARD}", own, view)
        return rows

    def _moved(self, rows: pa.Table, shard: str, names: list[str], view: str) -> pa.Table:
        """The rows, these columns of them told anew by the table whose tar takes the place of theirs."""
        tar = next(iter(rows.column(shard).drop_null().unique().to_pylist()), None)
        if tar is None or self._is_there(tar):
            return rows
        old = self._gone.get(tar)
        new = old and self._in(old.folder).best.get((old.partition, old.input_id))
        table = read_table(self._dataset, new) if new else rows.select(["key"]).slice(0, 0)
        spots = pc.index_in(rows.column("key"), value_set=table.column("key").combine_chunks())
        if shard == SHARD:
            rows, spots = rows.filter(spots.is_valid()), spots.drop_null()
        for column in names:
            if column == shard:
                there = pc.and_(spots.is_valid(), rows.column(shard).is_valid())
                found = pc.if_else(
                    there, pa.scalar(new.tar if new else None, pa.string()), pa.scalar(None, pa.string())
                )
            elif source := _told_as(column, view, table.column_names):
                found = table.column(source).take(spots)
            else:
                found = pa.nulls(rows.num_rows)
            place = rows.schema.get_field_index(column)
            rows = rows.set_column(place, rows.schema.field(place), found.cast(rows.schema.field(place).type))
        return rows


@dataclass(frozen=True, kw_only=True)
class _Staying:
    """What stays in a folder of tables."""

    tars: frozenset[str]
    best: dict[tuple[str, str], TableName]
    """By partition and input id."""


def _told_as(column: str, view: str, names: Collection[str]) -> str | None:
    """What a stage's table calls a column of the manifest: the manifest leaves out `packed_`, and of members the view."""
    member, _, part = column.rpartition("_")
    known = (f"packed_{column}", f"packed_{member}_{view}_{part}", f"{member}_{view}_{part}", column)
    return next((name for name in known if name in names), None)


def _runs(rows: pa.Table) -> Iterator[pa.Table]:
    """The manifest's rows shard by shard, as they lie."""
    if not rows.num_rows:
        return
    shards = rows.column(SHARD)
    changes = pc.not_equal(shards.slice(1), shards.slice(0, len(shards) - 1)).to_numpy()
    starts = [0, *(np.flatnonzero(changes) + 1).tolist()]
    for start, end in zip(starts, [*starts[1:], len(shards)]):
        yield rows.slice(start, end - start)
