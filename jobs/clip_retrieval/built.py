"""The index of a recipe's dataset on this machine: which one is there, what it was made of, and what has changed since.

`index.json` says which of the folders `index-<id>` beside it is read, and is replaced in one piece. Such a folder holds
image.index and text.index, and the img_emb/, text_emb/ and metadata/ that they were made of.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.recipe import Recipe
from pipeline.embeddings import IMAGES, TEXTS, embeddings_id, npy_bytes
from pipeline.plan import Ticket, make_plan
from pipeline.storage import Folder, read_json
from pipeline.tables import parquet_bytes, read_parquet
from pipeline.tombstones import TOMBSTONES, Tombstones, read_tombstones
from stages.clip import ClipConfig
from stages.ingest import ingested

from .environment import lock_id

POINTER = "index.json"
_CHANGES = {
    "tables": "the dataset has changed since",
    "models": "the recipe's CLIP is another one",
    "program": "clip-retrieval has another version",
    "index_gb": "another index_gb is asked for",
}


@dataclass(frozen=True, kw_only=True)
class Built:
    """An index that is there."""

    version: str
    """Its folder's name."""
    made_of: Mapping[str, Any]
    """What it was made of and with; equal where making it again would give the same."""
    tombstones: Sequence[str]
    """Files of tombstones that were heeded when it was made."""
    rows: int
    files: Mapping[str, int]
    """Rows of each metadata file, in order: positions count over all of them."""
    checked: Mapping[str, Mapping[str, float]]
    """By kind, what was found when it was asked for its own rows."""
    seconds: float
    """That making it took."""

    def publish(self, folder: Path) -> None:
        """Makes it the one that is read."""
        Folder(url=str(folder)).write(POINTER, json.dumps(asdict(self), indent=1).encode())


def default_folder(recipe: Recipe) -> Path:
    """Where a recipe's index lies if nothing else is said: `index/<recipe>` beside its runs."""
    return Path(recipe.runs).parent / "index" / recipe.name


def read_built(folder: Path) -> Built | None:
    """The index that is to be read; None where there is none, or what is there cannot be understood."""
    try:
        return Built(**read_json(Folder(url=str(folder)), POINTER, version=str, made_of=dict, files=dict))
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
        return None


def find_tickets(recipe: Recipe) -> list[Ticket]:
    """What is built of the recipe's source. Raises ValueError where nothing is."""
    tickets = make_plan(recipe.folder, recipe.stages, ingested(recipe.folder, recipe.source)).tickets
    if not tickets:
        raise ValueError(f"{recipe.dataset} holds no dataset of this source yet: run `densebridge build` first")
    return tickets


def made_of(recipe: Recipe, index_gb: float) -> dict[str, Any]:
    """What an index of the dataset as it is now would be made of, by names alone; `tables` is None where it is not built."""
    return {
        "tables": embeddings_id(recipe.stages, find_tickets(recipe)),
        "models": {column: _model(recipe, column) for column in (IMAGES, TEXTS)},
        "program": lock_id(),
        "index_gb": index_gb,
    }


def _model(recipe: Recipe, column: str) -> str:
    """What tells the model in whose space a column lies."""
    stage = next(s for s in reversed(recipe.stages) if column in s.writes.names)
    return str(stage.identity()["model"]) if isinstance(stage.config, ClipConfig) else stage.config_id


def changes(built: Built, wanted: Mapping[str, Any]) -> list[str]:
    """In words, why the index is not what `densebridge index` would make now."""
    return [words for name, words in _CHANGES.items() if built.made_of.get(name) != wanted[name]]


def taken_down(rows: pa.Table, tombstones: Tombstones) -> pa.ChunkedArray:
    """Which rows of metadata were taken down: bool (N,)."""
    gone = pc.is_in(rows.column("key"), value_set=pa.array(sorted(tombstones.keys), pa.string()))
    if "sha256" in rows.column_names:
        gone = pc.or_(gone, pc.is_in(rows.column("sha256"), value_set=pa.array(sorted(tombstones.sha256), pa.string())))
    if tombstones.domains:
        refused = [tombstones.refuses_url(url) for url in rows.column("url").to_pylist()]
        gone = pc.or_(gone, pa.chunked_array([pa.array(refused, pa.bool_())]))
    return gone


def tombstone_files(dataset: Folder) -> list[str]:
    """Names of the files of tombstones; they are only ever added."""
    return list(dataset.list(TOMBSTONES))


def holds_taken_down(dataset: Folder, metadata: Path) -> int:
    """How many rows of a folder of metadata were taken down."""
    tombstones = read_tombstones(dataset)
    there = Folder(url=str(metadata))
    names = there.list("") if tombstones else []
    return sum(pc.sum(taken_down(read_parquet(there, name), tombstones)).as_py() or 0 for name in names)


def write_again(version: Path, out: Folder, tombstones: Tombstones) -> None:
    """The embeddings that an index was made of, without what was taken down. Raises ValueError where nothing is left."""
    there, left = Folder(url=str(version / "metadata")), 0
    for name in there.list(""):
        rows = read_parquet(there, name)
        stays = pc.invert(taken_down(rows, tombstones))
        rows, left = rows.filter(stays), left + (pc.sum(stays).as_py() or 0)
        if not rows.num_rows:
            continue
        for kind in ("img_emb", "text_emb"):
            file = f"{kind}/{kind}_{name.removeprefix('metadata_').removesuffix('.parquet')}.npy"
            out.write(file, npy_bytes(np.load(version / file, mmap_mode="r")[stays.to_numpy()]))
        out.write(f"metadata/{name}", parquet_bytes(rows))
    if not left:
        raise ValueError(f"all samples of {version} were taken down: delete the index, there is nothing left for one")
