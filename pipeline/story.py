"""One sample's whole story: its source row, what every stage made of it, which shards hold it. For any stages and columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from .manifest import SHARD, Manifest
from .partitions import Partition, list_partitions
from .plan import Plan, depends_on
from .records import read_record
from .sample import MEMBERSHIP
from .settings import read_settings
from .shards import VIEWS
from .stage import Stage
from .storage import Folder, read_json
from .tables import TableName, list_tables, read_parquet, read_table
from .tombstones import TAKEN_DOWN, Tombstones, read_tombstones

READERS = 8  # partitions that are read at a time: on an object store each waits for an answer


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where bytes of the sample lie."""

    tar: str
    """Path in the dataset folder."""
    offset: int
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Chapter:
    """What one stage made of the sample."""

    stage: str
    outcome: str
    """`kept`, `dropped`, `failed`; `not reached` where a stage before ended it; `not made yet`."""
    reason: str = ""
    """Of a drop or a failure; of what was not reached, the stage that ended it and its reason."""
    table: str = ""
    """Path of the table in the dataset folder."""
    values: dict[str, Any] = field(default_factory=dict)
    """The columns that the stage wrote."""
    chosen: dict[str, Any] = field(default_factory=dict)
    """For a column `name` that counts into the setting `names`: what it stands for, such as the prompt that was asked."""
    places: dict[str, Place] = field(default_factory=dict)
    """Where the bytes that it wrote lie, by column."""
    attempts: int | None = None
    """How often it was tried; None where the stage keeps no record."""
    tried_at: str | None = None
    """When it was tried last, in UTC."""
    settings: dict[str, Any] | None = None
    """What it depends on, as the recipe spelled it (a model by its name and revision); None where nobody wrote it down."""


@dataclass(frozen=True, kw_only=True)
class ShardPlace:
    """A shard that holds the sample."""

    view: str
    places: dict[str, Place]
    """By column."""
    is_present: bool
    """Whether the view's present version has it there; otherwise it lies in a shard of an older version."""


@dataclass(frozen=True, kw_only=True)
class Story:
    """Everything that the dataset folder knows of a sample."""

    key: str
    taken_down: str
    """`key`, `domain` or `sha256`, whichever a tombstone names; empty if none does."""
    partition: str = ""
    """Empty where no partition holds the sample."""
    is_listed: bool = False
    """Whether the recipe's source lists it, as it was when it was last ingested; as long as it never was, all are listed."""
    source: dict[str, Any] = field(default_factory=dict)
    """Its row: url, text and the source's further columns."""
    chapters: list[Chapter] = field(default_factory=list)
    """The recipe's stages, in order. None where the source lists nothing of the partition."""
    shards: list[ShardPlace] = field(default_factory=list)


def tell_story(dataset: Folder, plan: Plan, *, key: str, url: str = "") -> Story | None:
    """The story of the sample of this key, as the plan's stages have it; None of one that is not known. The `url`, where
    the caller knows it, tells of one that is in no partition whether its domain was taken down.
    """
    tombstones = read_tombstones(dataset)
    found = find_partition(dataset, key)
    if found is None:
        taken_down = _taken_down(tombstones, key, url, [])
        return Story(key=key, taken_down=taken_down) if taken_down else None
    partition, row = found
    spot = next((s for s, t in enumerate(plan.tickets) if t.partition.name == partition.name), None)
    chapters = [] if spot is None else _chapters(dataset, plan, spot, key)
    absent = "" if spot is None else plan.tickets[spot].partition.absent
    return Story(
        key=key,
        taken_down=_taken_down(tombstones, key, row["url"], chapters),
        partition=partition.name,
        is_listed=spot is not None and not (absent and _row(read_parquet(dataset, absent), key)),
        source={name: row[name] for name in row if name != MEMBERSHIP[0]},
        chapters=chapters,
        shards=find_shards(dataset, partition.name, key),
    )


def find_partition(dataset: Folder, key: str) -> tuple[Partition, dict[str, Any]] | None:
    """The partition that holds the key, and its row there. Reads the key columns, the newest first, until it is found."""
    partitions = list_partitions(dataset)[::-1]
    with ThreadPoolExecutor(READERS) as readers:
        tables = readers.map(lambda p: read_parquet(dataset, p.parquet, ["key"]), partitions)
        for partition, table in zip(partitions, tables, strict=True):
            if pc.index(table.column("key"), key).as_py() >= 0:
                readers.shutdown(wait=False, cancel_futures=True)
                row = _row(read_parquet(dataset, partition.parquet), key)
                assert row
                return partition, row
    return None


def find_shards(dataset: Folder, partition: str, key: str) -> list[ShardPlace]:
    """Every shard of every view that holds the sample, those of older versions too."""
    present = set()
    for name in filter(lambda n: n.endswith(".json"), dataset.list(VIEWS)):
        manifest = read_json(dataset, f"{VIEWS}/{name}", manifest=str)["manifest"]
        pieces = Manifest(dataset, manifest).batches(["key", SHARD]) if dataset.exists(manifest) else ()
        present |= {row[SHARD] for row in (_row(rows, key) for rows in pieces) if row}
    found = []
    for folder in dataset.folders(VIEWS):
        tables = list_tables(dataset, f"{VIEWS}/{folder}", with_tar=True)
        # Several tables may name one tar.
        for table in {table.tar: table for table in tables.get(partition, ())}.values():
            row = _row(read_table(dataset, table), key)
            places = _places(table, row) if row else {}
            if places:
                view = folder.rpartition("-")[0]
                found.append(ShardPlace(view=view, places=places, is_present=table.tar in present))
    return sorted(found, key=lambda shard: (shard.view, not shard.is_present))


def _chapters(dataset: Folder, plan: Plan, spot: int, key: str) -> list[Chapter]:
    stages = [here.stage for here in plan.stages]
    ended: dict[str, str] = {}  # by stage at or before which the sample's way ended: which stage that was, and why
    found = []
    for index, stage in enumerate(stages):
        table = plan.tickets[spot].tables.get(stage.name)
        row = _row(read_table(dataset, table), key) if table else None
        before = next((ended[s.name] for s in depends_on(stages, index) if s.name in ended), "")
        if table and row:
            chapter = _chapter(dataset, stage, table, row)
            if chapter.outcome != "kept":
                ended[stage.name] = f"{chapter.outcome} by {stage.name}: {chapter.reason}"
        elif before or table:
            ended[stage.name] = before
            chapter = Chapter(stage=stage.name, outcome="not reached", reason=before)
        else:
            chapter = Chapter(stage=stage.name, outcome="not made yet")
        found.append(chapter)
    return found


def _chapter(dataset: Folder, stage: Stage, table: TableName, row: Mapping[str, Any]) -> Chapter:
    settings = _spelled(dataset, table.folder)
    record = _row(read_record(dataset, table), row["key"]) if stage.recorded else None
    values = {name: row[name] for name in stage.writes.names}
    return Chapter(
        stage=stage.name,
        outcome=row["status"],
        reason=row["reason"] or "",
        table=table.parquet,
        values=values,
        chosen=_chosen(values, settings or {}),
        places=_places(table, row),
        attempts=record["attempts"] if record else None,
        tried_at=record["tried_at"].isoformat() if record else None,
        settings=settings,
    )


def _spelled(dataset: Folder, folder: str) -> dict[str, Any] | None:
    """The configuration of a stage folder, without what changes nothing that is written, such as the batch size."""
    found = read_settings(dataset, folder)
    if found is None:
        return None
    identity = found["identity"]
    return {n: v for n, v in found["configuration"].items() if not isinstance(identity, dict) or n in identity}


def _chosen(values: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, value in values.items():
        choices = settings.get(f"{name}s")
        if type(value) is int and isinstance(choices, list) and 0 <= value < len(choices):
            found[name] = choices[value]
    return found


def _places(table: TableName, row: Mapping[str, Any]) -> dict[str, Place]:
    names = [n.removesuffix("_offset") for n, value in row.items() if n.endswith("_offset") and value is not None]
    return {
        name: Place(tar=table.tar, offset=row[f"{name}_offset"], size=row[f"{name}_size"], sha256=row[f"{name}_sha256"])
        for name in names
    }


def _taken_down(tombstones: Tombstones, key: str, url: str, chapters: Sequence[Chapter]) -> str:
    if key in tombstones.keys:
        return tombstones.causes[key]
    if tombstones.refuses_url(url):
        return "domain"
    gone = (c.reason == TAKEN_DOWN or c.values.get("sha256") in tombstones.sha256 for c in chapters)
    return "sha256" if any(gone) else ""


def _row(table: pa.Table, key: str) -> dict[str, Any] | None:
    """The row of this key."""
    spot = pc.index(table.column("key"), key).as_py()
    return table.slice(spot, 1).to_pylist()[0] if spot >= 0 else None
