"""A view's shards → its manifest and `views/<view>.json`, which names the present version. The build does it last."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.captions import tokenizer_facts
from pipeline.fingerprint import digest_of, plain
from pipeline.manifest import SHARD, writing_manifest
from pipeline.parallel import map_ahead
from pipeline.plan import Ticket
from pipeline.shards import FORMAT, VIEWS, ViewInfo, name_version, publish_version, read_info
from pipeline.stage import Stage
from pipeline.storage import Folder
from pipeline.tables import read_table

from .pack import Pack

READERS = 8  # tables that are read at a time: elsewhere each is a wait


def companions_of(pack: Pack, stages: Sequence[Stage]) -> list[Stage]:
    """The stages that add members to the view's samples: those whose `companion_of` is its name."""
    return [stage for stage in stages if getattr(stage, "companion_of", None) == pack.config.view]


def publish_view(
    dataset: Folder,
    pack: Pack,
    tickets: Sequence[Ticket],
    companions: Sequence[Any] = (),
    stages: Sequence[Stage] = (),
) -> ViewInfo:
    """Writes the manifest of the tickets' shards and names it as the view's present version; does nothing if it is.

    A companion is a later stage with payloads called `<member>_<view>`, an attribute `companion_of` (the view's name) and a
    property `view_facts`. `stages` are the recipe's, whose settings the view then tells.
    """
    made = [pack, *companions]
    contents = [ticket.tables[stage.name].content_id for stage in made for ticket in tickets]
    version = digest_of(str(FORMAT), *(stage.config_id for stage in made), *contents)
    info = ViewInfo(
        view=pack.config.view,
        version=version,
        resolution=pack.config.resolution,
        samples=0,
        manifest=f"{pack.folder}/manifest-{version}.parquet",
        tokenizers={t.name: tokenizer_facts(t) for t in pack.config.tokenizers},
        shape=pack.config.shape,
        members=_members(pack, companions),
        companions={name: fact for stage in companions for name, fact in stage.view_facts.items()},
        made_by={s.name: _settings(s) for s in stages if s in made or not _packs(s)},
    )
    present = _present(dataset, info)
    if present:
        info = replace(info, samples=present.samples, manifest_sha256=present.manifest_sha256)
        if json.dumps(asdict(info), sort_keys=True) != json.dumps(asdict(present), sort_keys=True):
            name_version(dataset, info)
        return info
    pieces = map_ahead(partial(_manifest_rows, dataset, pack, companions), tickets, READERS)
    with writing_manifest(dataset, pack.folder) as manifest:
        for rows in pieces:
            manifest.add(rows)
        manifest.close()
        return publish_version(dataset, info, manifest)


def _packs(stage: Stage) -> bool:
    return isinstance(stage, Pack) or hasattr(stage, "companion_of")


def _settings(stage: Stage) -> dict[str, Any]:
    """What the stage's output depends on, and its settings as they were written, but for those that change nothing."""
    settings = plain(stage.config, frozenset(stage.not_fingerprinted))
    return {"version": stage.version, "identity": stage.identity(), "settings": settings}


def _present(dataset: Folder, info: ViewInfo) -> ViewInfo | None:
    """What the pointer says, if it names this version and its manifest is there. A damaged one is made anew."""
    pointer = f"{VIEWS}/{info.view}.json"
    if not dataset.exists(pointer):
        return None
    with suppress(ValueError):
        present = read_info(dataset, pointer)
        if present and present.version == info.version and dataset.exists(present.manifest):
            return present
    return None


def _members(pack: Pack, companions: Sequence[Stage]) -> dict[str, str]:
    """Per member, as the manifest calls it, the ending of its name in the tars."""
    own = {_member(column, pack.config.view): ending for column, ending in pack.payload.items()}
    return own | {_member(c, pack.config.view): e for stage in companions for c, e in stage.payload.items()}


def _member(column: str, view: str) -> str:
    """What the manifest calls a payload."""
    name = column.removeprefix("packed_")
    return name if name.startswith("tokens_") else name.removesuffix(f"_{view}")


def _manifest_rows(dataset: Folder, pack: Pack, companions: Sequence[Stage], ticket: Ticket) -> pa.Table:
    """What the trainer has to know of one partition's samples."""
    table, view = ticket.tables[pack.name], pack.config.view
    names = {column: column.removeprefix("packed_") for column in pack.writes.names}
    for column in pack.payload:
        names |= {f"{column}_{part}": f"{_member(column, view)}_{part}" for part in ("offset", "size", "crc32")}
        names |= {f"{column}_length": f"{_member(column, view)}_length"} if f"{column}_length" in names else {}
    rows = read_table(dataset, table, ["key", "status", *names])
    rows = rows.filter(pc.equal(rows.column("status"), "kept"))
    shard = pa.array([table.tar] * rows.num_rows, pa.string())
    columns = {"key": rows.column("key"), SHARD: shard} | {new: rows.column(old) for old, new in names.items()}
    for companion in companions:
        columns |= _companion_columns(dataset, companion, ticket, view, rows.column("key"))
    return pa.table(columns)


def _companion_columns(
    dataset: Folder, stage: Stage, ticket: Ticket, view: str, keys: pa.ChunkedArray
) -> Iterator[tuple[str, Any]]:
    """Where a companion's members of these samples lie, if they have any."""
    table = ticket.tables[stage.name]
    for column in stage.payload:
        parts = [
            part for part in ("offset", "size", "crc32") if part != "crc32" or f"{column}_crc32" in stage.writes.names
        ]
        found = read_table(dataset, table, ["key", *(f"{column}_{part}" for part in parts)])
        spots = pc.index_in(keys, value_set=found.column("key").combine_chunks())
        member = _member(column, view)
        there = {part: found.column(f"{column}_{part}").take(spots) for part in parts}
        yield f"{member}_{SHARD}", pc.if_else(there["offset"].is_valid(), table.tar, pa.scalar(None, pa.string()))
        yield f"{member}_offset", there["offset"]
        yield f"{member}_size", there["size"]
        yield f"{member}_crc32", there.get("crc32", pa.nulls(len(keys), pa.uint32()))
