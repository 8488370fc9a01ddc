"""What no recipe can reach any more: a listing of the dataset folder, held against the recipes' plans.

A table stays where a plan names it, and where a plan lacks a partition's table all that the folder holds for it, because a
build may take rows over from there. A view's present manifest stays, with the tables of its shards. What is young stays,
because somebody may just be writing it. And what does not look like ours is never touched.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import groupby

from .earlier import find_siblings
from .manifest import Manifest
from .partitions import PARTITIONS, SOURCES, list_partitions
from .plan import Plan
from .records import record_name
from .settings import SETTINGS, describe, differences, read_settings
from .shards import VIEWS
from .storage import ASIDE, Entry, Folder, read_json
from .tables import STAGE_FOLDER, TableName, stage_folders, tar_partition
from .tombstones import TOMBSTONES

_TARS = 2  # when their turn comes
_PIECE = 1 << 23  # bytes
ABSENT, RECORDS = f"{SOURCES}/absent", "/records"
KILLED, SUPERSEDED = "left by a killed build", "superseded"
DELETERS = 8  # files that are deleted at a time: on an object store each waits for an answer

_RECORD = re.compile(r"[0-9a-f]{16}\.json")
_MANIFEST = re.compile(r"manifest-[0-9a-f]{16}\.parquet")
_PARTITION = re.compile(r"\d+-[0-9a-f]{8}\.\d+\.[0-9a-f]{16}\.parquet")

Survey = Mapping[str, Sequence[Entry]]
"""The files of every folder that can hold garbage."""


@dataclass(frozen=True, kw_only=True)
class Garbage:
    """Files of one folder that go for one reason."""

    folder: str
    why: str
    files: tuple[str, ...]
    """Their paths in the dataset folder."""
    size: int
    """Bytes, all together."""


def survey(dataset: Folder) -> Survey:
    """Lists what there is. To be done before the plans are made: what is published in between is then not judged at all."""
    there = {name: dataset.entries(name) for name in (PARTITIONS, SOURCES, ABSENT, TOMBSTONES, VIEWS)}
    for folder in stage_folders(dataset):
        entries = dataset.entries(folder)
        names = [e.name for e in entries]
        if SETTINGS in names or all(n.startswith(ASIDE) or _partition_of(folder, n) for n in names):
            there |= {folder: entries, folder + RECORDS: dataset.entries(folder + RECORDS)}
    return there


def find_garbage(
    dataset: Folder,
    there: Survey,
    plans: Sequence[Plan],
    *,
    views: Collection[str],
    manifests: Collection[str],
    min_age: float,
) -> list[Garbage]:
    """What none of the plans reaches, by folder. `views` are those that the recipes pack or train on, `manifests` the
    sha256 of older ones that a training may go on with; what is younger than `min_age` seconds stays.
    """
    kept = (
        _reachable(dataset, plans) | _of_views(dataset, there, views, manifests) | _young(there, time.time() - min_age)
    )
    judge = _Judge(dataset, there, plans)
    found: dict[tuple[str, str], list[tuple[str, int]]] = {}
    remaining: dict[str, int] = {}
    for folder, entries in there.items():
        stage_folder = folder.removesuffix(RECORDS)
        for entry in entries:
            path = f"{folder}/{entry.name}"
            why = "" if path in kept or entry.name == SETTINGS else judge.why(folder, entry.name)
            if why:
                found.setdefault((stage_folder, why), []).append((path, entry.size))
            elif entry.name != SETTINGS or path in kept:
                remaining[stage_folder] = remaining.get(stage_folder, 0) + 1
    for folder, entries in there.items():
        for entry in entries:
            if entry.name == SETTINGS and not remaining.get(folder):  # it stays as long as it explains anything
                found.setdefault((folder, judge.older(folder)), []).append((f"{folder}/{SETTINGS}", entry.size))
    return [
        Garbage(folder=folder, why=why, files=tuple(path for path, _ in files), size=sum(size for _, size in files))
        for (folder, why), files in sorted(found.items())
    ]


def delete_garbage(dataset: Folder, garbage: Iterable[Garbage]) -> None:
    """Deletes it, in such an order that after a death on the way nothing speaks of what is gone: pointers, tables, tars."""
    garbage = list(garbage)
    paths = sorted((path for item in garbage for path in item.files), key=_turn)
    with ThreadPoolExecutor(DELETERS) as deleters:
        for turn, together in groupby(paths, key=_turn):
            named = _named_tars(dataset, garbage) if turn == _TARS else set()  # a build may have come to use one again
            list(deleters.map(dataset.remove, (path for path in together if path not in named)))
    if dataset.is_local:  # elsewhere a folder is gone with its last file
        for folder in {item.folder for item in garbage if STAGE_FOLDER.fullmatch(item.folder)}:
            for name in (folder + RECORDS, folder):
                with suppress(OSError):  # something is left in it
                    os.rmdir(dataset.path(name))


def _named_tars(dataset: Folder, garbage: Iterable[Garbage]) -> set[str]:
    """The tars that tables name now."""
    folders = {item.folder for item in garbage if STAGE_FOLDER.fullmatch(item.folder)}
    tables = (TableName.parse(folder, name) for folder in folders for name in dataset.list(folder))
    return {table.tar for table in tables if table}


def _turn(path: str) -> int:
    """A folder's settings go last: they tell the next try whose folder it is."""
    if path.endswith(f"/{SETTINGS}"):
        return 3
    return 0 if path.endswith(".json") else 1 if path.endswith(".parquet") else _TARS


def _reachable(dataset: Folder, plans: Sequence[Plan]) -> set[str]:
    """The files that the plans name or can make use of."""
    found = {partition.parquet for partition in list_partitions(dataset)}
    for name in filter(_RECORD.fullmatch, dataset.list(SOURCES)):
        found.update(read_json(dataset, f"{SOURCES}/{name}", partitions=dict)["partitions"].values())
    for plan in plans:
        for ticket in plan.tickets:
            for table in ticket.tables.values():
                found |= _files(table)
        for here in plan.stages:
            found.add(f"{here.stage.folder}/{SETTINGS}")
            siblings = find_siblings(dataset, here.stage) if here.missing else []
            for spot in here.missing:
                name = plan.tickets[spot].partition.name
                for tables in (here.tables, *(sibling.tables for sibling in siblings)):
                    found = found.union(*map(_files, tables.get(name, ())))
            found |= {f"{t.folder}/{SETTINGS}" for s in siblings for tables in s.tables.values() for t in tables[:1]}
    return found


def _of_views(dataset: Folder, there: Survey, views: Collection[str], manifests: Collection[str]) -> set[str]:
    """The views' pointers, their manifests and those asked for by digest, and the tables beside the shards of all these."""
    found, kept = set(), set()
    for entry in there[VIEWS]:
        if entry.name.removesuffix(".json") in views:
            found.add(f"{VIEWS}/{entry.name}")
            kept.add(read_json(dataset, f"{VIEWS}/{entry.name}", manifest=str)["manifest"])
    paths = {f"{folder}/{e.name}" for folder, entries in there.items() for e in entries if _MANIFEST.fullmatch(e.name)}
    for path in paths - kept if manifests else ():
        digest = hashlib.sha256()
        with dataset.open(path) as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
        if digest.hexdigest() in manifests:
            kept.add(path)
    beside = _tables_by_tar(there)
    for manifest in kept & paths:
        for shard in Manifest(dataset, manifest).shards:
            found |= {shard}.union(*map(_files, beside.get(shard, ())))
    return found | kept


def _tables_by_tar(there: Survey) -> dict[str, list[TableName]]:
    """The tables beside each tar."""
    found: dict[str, list[TableName]] = {}
    for folder, entries in there.items():
        for table in (TableName.parse(folder, entry.name) for entry in entries):
            if table:
                found.setdefault(table.tar, []).append(table)
    return found


def _young(there: Survey, since: float) -> set[str]:
    """The files written after that time, and what belongs to the tables among them."""
    found = set()
    for folder, entries in there.items():
        for entry in entries:
            if entry.modified > since:
                table = _table_of(folder, entry.name)
                found |= {f"{folder}/{entry.name}"} | (_files(table) if table else set())
    return found


def _files(table: TableName) -> set[str]:
    return {table.parquet, table.tar, record_name(table)}


def _table_of(folder: str, name: str) -> TableName | None:
    """The table that a parquet file or a record belongs to; None for other files."""
    try:
        return TableName.parse(folder.removesuffix(RECORDS), name)
    except ValueError:
        return None


def _partition_of(folder: str, name: str) -> str | None:
    """The partition of a table, its record or its tar; None for other files."""
    table = _table_of(folder, name)
    return table.partition if table else tar_partition(name)


class _Judge:
    """Says of a file that nobody reaches why it is garbage."""

    def __init__(self, dataset: Folder, there: Survey, plans: Sequence[Plan]) -> None:
        self._dataset = dataset
        self._stages = [s.stage for plan in plans for s in plan.stages]
        self._current = {stage.folder for stage in self._stages}
        self._walked = {ticket.partition.name for plan in plans for ticket in plan.tickets}
        self._there = {f"{folder}/{entry.name}" for folder, entries in there.items() for entry in entries}
        self._beside = _tables_by_tar(there)
        self.older = cache(self._older)

    def why(self, folder: str, name: str) -> str:
        """The reason; empty for a file that is not ours to judge."""
        if name.startswith(ASIDE):
            return KILLED
        if folder in (PARTITIONS, ABSENT, SOURCES, TOMBSTONES, VIEWS):
            if folder == VIEWS:
                return "no recipe given has this view" if self._is_pointer(f"{VIEWS}/{name}") else ""
            old = folder == ABSENT or (folder == PARTITIONS and _PARTITION.fullmatch(name))
            return SUPERSEDED if old else ""
        if _MANIFEST.fullmatch(name):
            return "old view version"
        partition = _partition_of(folder, name)
        if partition is None:
            return ""
        stage_folder = folder.removesuffix(RECORDS)
        if stage_folder not in self._current:
            return self.older(stage_folder)
        table = _table_of(folder, name)
        if table.parquet not in self._there if table else f"{folder}/{name}" not in self._beside:
            return KILLED
        return SUPERSEDED if partition in self._walked else "no source of the recipes given lists it"

    def _is_pointer(self, path: str) -> bool:
        """Whether the file points to a view's manifest; a note of another shape is somebody else's."""
        if not path.endswith(".json"):
            return False
        with suppress(ValueError, FileNotFoundError):
            return bool(read_json(self._dataset, path, manifest=str))
        return False

    def _older(self, folder: str) -> str:
        """How a folder's settings differ from the nearest of the same stage that a recipe has."""
        settings = read_settings(self._dataset, folder)
        if settings is None:
            return "older settings"
        named = [describe(stage) for stage in self._stages if stage.name == settings["stage"]]
        if not named:
            return f"no recipe given has stage {settings['stage']}"
        changes = min((differences(settings, new) for new in named), key=len)
        return "older settings" + (": " + "; ".join(changes) if changes else "")
