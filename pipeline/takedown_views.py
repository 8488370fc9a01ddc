"""Takes rows out of the manifests of views, so that the present version of each is right before anything is built."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from concurrent.futures import Executor
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .fingerprint import digest_of
from .shards import FORMAT, VIEWS, View, ViewInfo, publish_version
from .storage import Folder
from .tables import TableName, list_tables, parquet_bytes, read_parquet, read_table
from .takedown_tables import Removed, Rewritten, part_rows


def rewrite_views(
    dataset: Folder, forgotten: frozenset[str], stale: Collection[str], pool: Executor, *, dry_run: bool
) -> Rewritten:
    """Names a new version of every view whose manifest speaks of forgotten samples or of shards that go (`stale`), and
    tells which manifests are to be removed: those that no view names and that speak of such.
    """
    removed, going, named = Removed(), list[str](), set[str]()
    for info in present_views(dataset):
        named.add(info.manifest)
        stays, gone = part_rows(View(dataset, info).manifest, forgotten)
        shards = _Shards(dataset, info.manifest.rsplit("/", 1)[0], stale)
        if not gone.num_rows and shards.are_there(stays):
            continue
        removed += Removed(files=1, rows=gone.num_rows, bytes=gone.nbytes)
        going.append(info.manifest)
        if not dry_run:
            _publish_version(dataset, info, shards.follow(stays, pool))
    for folder in dataset.folders(VIEWS):
        shards = _Shards(dataset, f"{VIEWS}/{folder}", stale)
        for name in manifests_in(dataset, f"{VIEWS}/{folder}"):
            if name not in named:
                stays, gone = part_rows(read_parquet(dataset, name, ["key", "shard"]), forgotten)
                if gone.num_rows or not shards.are_there(stays):
                    removed += Removed(files=1, rows=gone.num_rows, bytes=gone.nbytes)
                    going.append(name)
    return Rewritten(removed=removed, stale=tuple(going))


def present_views(dataset: Folder) -> Iterator[ViewInfo]:
    """The present version of each view whose manifest is there. One of another format is made again by the next build."""
    for name in dataset.list(VIEWS):
        if name.endswith(".json"):
            found = json.loads(dataset.read(f"{VIEWS}/{name}"))
            if found.get("format") == FORMAT and dataset.exists(found["manifest"]):
                yield ViewInfo(**found)


def manifests_in(dataset: Folder, folder: str) -> list[str]:
    """The manifests of all versions that lie in a view's folder."""
    return [f"{folder}/{n}" for n in dataset.list(folder) if n.startswith("manifest-") and n.endswith(".parquet")]


class _Shards:
    """The shards of one view's folder as they are once the stale ones are gone."""

    def __init__(self, dataset: Folder, folder: str, stale: Collection[str]) -> None:
        self._dataset = dataset
        tables = [t for found in list_tables(dataset, folder, with_tar=True).values() for t in found]
        tables = [t for t in tables if t.parquet not in stale]
        self._tars = {t.tar for t in tables}
        # The best of each input, as `list_tables` has it first.
        self._present = {(t.partition, t.input_id): t for t in reversed(tables)}

    def are_there(self, manifest: pa.Table) -> bool:
        """Whether every shard that the manifest names is there."""
        return self._tars.issuperset(manifest.column("shard").unique().to_pylist())

    def follow(self, manifest: pa.Table, pool: Executor) -> pa.Table:
        """The manifest with shards and places as they are now. Rows of a shard that has no successor are left out: its table
        was lost earlier, and the next build makes both again.
        """
        found = pool.map(self._follow_shard, _runs(manifest))
        return pa.concat_tables([manifest.schema.empty_table(), *found])

    def _follow_shard(self, rows: pa.Table) -> pa.Table:
        tar = rows.column("shard")[0].as_py()
        if tar in self._tars:
            return rows
        folder, name = tar.rsplit("/", 1)
        old = TableName.parse(folder, name.removesuffix("tar") + "parquet")
        new = old and self._present.get((old.partition, old.input_id))
        if not new:
            return rows.slice(0, 0)
        table = read_table(self._dataset, new)
        spots = pc.index_in(rows.column("key"), value_set=table.column("key").combine_chunks())
        rows, spots = rows.filter(spots.is_valid()), spots.drop_null()
        columns = {}
        for field in rows.schema:
            packed = f"packed_{field.name}"  # so the pack stage calls what a manifest calls by its own name
            source = packed if packed in table.column_names else field.name
            columns[field.name] = table.column(source).take(spots) if source in table.column_names else None
        columns["shard"] = pa.array([new.tar] * rows.num_rows, pa.string())
        return pa.table(columns, schema=rows.schema)


def _runs(manifest: pa.Table) -> Iterator[pa.Table]:
    """The manifest's rows shard by shard, as they lie."""
    if not manifest.num_rows:
        return
    shards = manifest.column("shard")
    changes = pc.not_equal(shards.slice(1), shards.slice(0, len(shards) - 1)).to_numpy()
    starts = [0, *(np.flatnonzero(changes) + 1).tolist()]
    for start, end in zip(starts, [*starts[1:], len(shards)]):
        yield manifest.slice(start, end - start)


def _publish_version(dataset: Folder, old: ViewInfo, manifest: pa.Table) -> None:
    """The version follows from what was and what is, so that whoever is interrupted and goes on comes to the same."""
    data = parquet_bytes(manifest.combine_chunks())
    version = digest_of(old.version, data)
    info = replace(
        old,
        version=version,
        samples=manifest.num_rows,
        manifest=f"{old.manifest.rsplit('/', 1)[0]}/manifest-{version}.parquet",
    )
    publish_version(dataset, info, data)
