"""The proof of a takedown: reads again, from the files alone, what could hold a sample that was to go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import repeat

from .manifest import Manifest
from .partitions import PARTITIONS
from .shards import View
from .storage import Folder
from .tables import TableName, read_parquet
from .takedown_tables import reading_tar, values_of
from .takedown_views import manifests_in, present_views
from .tombstones import Tombstones


@dataclass(frozen=True, kw_only=True)
class Check:
    """What was read, and where anything was left."""

    files: int
    rows: int
    """Rows of parquet files and members of tars."""
    left: tuple[str, ...]
    """Files that still hold forgotten samples, or that a view names and that are not there; each with what is wrong."""


@dataclass(frozen=True, kw_only=True)
class _Read:
    """One file, read again."""

    rows: int
    held: int
    """Of them, those of forgotten samples."""


def check_gone(
    dataset: Folder,
    folders: Sequence[str],
    tombstones: Tombstones,
    forgotten: frozenset[str],
    clean: frozenset[str],
    tars: Sequence[str],
    pool: Executor,
) -> Check:
    """Reads the files of all partitions, all manifests, the tables and records of the partitions that are not `clean`, and
    the members' names in the `tars` that were written anew.
    """

    files = [*_files(dataset, folders, clean, "url" if tombstones.domains else "key"), *((tar, "") for tar in tars)]
    found = list(pool.map(lambda file: _read(dataset, file[0], file[1], tombstones, forgotten), files))
    left = [f"{name}: {read.held} rows" for (name, _), read in zip(files, found, strict=True) if read.held]
    return Check(files=len(found), rows=sum(read.rows for read in found), left=(*left, *_broken_views(dataset)))


def _files(dataset: Folder, folders: Iterable[str], clean: frozenset[str], telling: str) -> Iterator[tuple[str, str]]:
    """The parquet files that could name a sample, each with the further column that tells; `telling` is the partitions'."""
    yield from ((f"{PARTITIONS}/{n}", telling) for n in dataset.list(PARTITIONS) if n.endswith(".parquet"))
    for folder in folders:
        for name in dataset.list(folder):
            table = TableName.parse(folder, name)
            if table and table.partition not in clean:
                yield table.parquet, "sha256"
        for name in dataset.list(f"{folder}/records"):
            if name.split(".")[0] not in clean:
                yield f"{folder}/records/{name}", "key"
        yield from ((name, "key") for name in manifests_in(dataset, folder))


def _read(dataset: Folder, name: str, telling: str, tombstones: Tombstones, forgotten: frozenset[str]) -> _Read:
    """Reads a parquet file or a tar again and counts what it holds of forgotten samples."""
    if name.endswith(".tar"):
        keys = _members(dataset, name)
        return _Read(rows=len(keys), held=sum(key in forgotten for key in keys))
    if telling == "key":  # manifests among them, which may have tens of millions of rows
        pieces = (list(values_of(rows.column("key"))) for rows in Manifest(dataset, name).batches(["key"]))
        counts = [(len(keys), sum(key in forgotten for key in keys)) for keys in pieces]
        return _Read(rows=sum(rows for rows, _ in counts), held=sum(held for _, held in counts))
    rows = read_parquet(dataset, name, ["key", telling])
    columns = dict(zip(rows.column_names, map(values_of, rows.columns), strict=True))
    url, sha256 = (columns.get(name, repeat(None)) for name in ("url", "sha256"))
    held = (
        key in forgotten or (u and tombstones.refuses_url(u)) or s in tombstones.sha256
        for key, u, s in zip(columns["key"], url, sha256)
    )
    return _Read(rows=rows.num_rows, held=sum(map(bool, held)))


def _members(dataset: Folder, tar: str) -> list[str]:
    """The key of each member."""
    with reading_tar(dataset, tar) as members:
        return [member.name.split(".", 1)[0] for member in members]


def _broken_views(dataset: Folder) -> list[str]:
    """Present versions of views that name shards which are not there."""
    broken = []
    for info in present_views(dataset):
        shards = View(dataset, info).manifest.shards
        folders = {shard.rsplit("/", 1)[0] for shard in shards}
        gone = shards - {f"{folder}/{name}" for folder in folders for name in dataset.list(folder)}
        broken += [f"views/{info.view}.json: {shard} is not there" for shard in sorted(gone)]
    return broken
