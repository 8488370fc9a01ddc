"""Make the dataset searchable: the embeddings that the build kept become clip-retrieval's indices, in a new folder that takes the
old one's place when it is whole and checked. What is up to date stays. clip-retrieval gets an environment of its own, once.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from pipeline.embeddings import write_embeddings
from pipeline.fingerprint import digest_of
from pipeline.storage import Folder
from pipeline.tombstones import read_tombstones

from .clip_retrieval.alignment import KINDS, check_counts, check_index
from .clip_retrieval.built import (
    Built,
    changes,
    default_folder,
    find_tickets,
    holds_taken_down,
    made_of,
    read_built,
    tombstone_files,
    write_again,
)
from .clip_retrieval.environment import Inside, environment, locked
from .recipe import Recipe, parse

VERSION, MAKING = "index-", "making-"


@dataclass(frozen=True, kw_only=True)
class IndexOptions:
    """Options of `densebridge index`."""

    folder: Path | None = None
    """Where the index lies, on this machine's disk; `index/<recipe>` beside the recipe's runs if not given."""
    index_gb: float = 4.0
    """The most memory that one index may take when it is read; above it vectors are compressed."""
    memory_gb: float = 0.0
    """The most memory for making it; 0 is what is free now."""
    json: bool = False
    """Print what `index.json` says instead of lines."""

    def __post_init__(self) -> None:
        if self.index_gb <= 0 or self.memory_gb < 0:
            raise ValueError(
                f"index_gb must be above 0 and memory_gb not negative, got {self.index_gb}, {self.memory_gb}"
            )


def make_index(recipe: Recipe, folder: Path, options: IndexOptions) -> tuple[Built, bool]:
    """The index of the dataset as it is now, and whether it was there already. After a takedown and before the next build it is
    the old one's, without what was taken down. Raises ValueError where there is nothing to index, the dataset changes meanwhile,
    or the index does not answer with its own rows; then the old one stays.
    """
    state = made_of(recipe, options.index_gb)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "index.lock"):
        there = read_built(folder)
        there = there if there and (folder / there.version).is_dir() else None
        if there and not changes(there, state):
            return there, True
        _sweep(folder, there)
        environment()
        making = folder / f"{MAKING}{uuid.uuid4().hex}"
        try:
            purged = there if state["tables"] is None and there and _holds_taken_down(recipe, folder, there) else None
            built = _make(recipe, folder, making, options, state, purged)
        finally:
            shutil.rmtree(making, ignore_errors=True)
        _sweep(folder, built)  # who has the old one open keeps it until he is done
    return built, False


def _make(
    recipe: Recipe, folder: Path, making: Path, options: IndexOptions, state: dict[str, Any], purged: Built | None
) -> Built:
    """Makes an index aside, checks it, and lets it take the old one's place. `purged`: of that one's rows, not the dataset's."""
    started, tombstones = time.monotonic(), tombstone_files(recipe.folder)
    embeddings, index = making / "embeddings", making / "index"
    made_from = state
    if purged:
        write_again(folder / purged.version, Folder(url=str(embeddings)), read_tombstones(recipe.folder))
        tables = digest_of(str(purged.made_of["tables"]), *tombstones)
        made_from = {**state, "tables": tables, "models": purged.made_of["models"]}
    else:
        _lay_out(recipe, embeddings)
    files = check_counts(embeddings)
    index.mkdir()
    free = options.memory_gb or psutil.virtual_memory().available / 2**30
    with Inside("index", str(embeddings), str(index), f"{options.index_gb:.3f}G", f"{free:.3f}G") as inside:
        inside.hear()
    checked = {kind: asdict(check_index(embeddings, index, files, kind)) for kind in KINDS}
    if made_of(recipe, options.index_gb) != state or tombstone_files(recipe.folder) != tombstones:
        raise ValueError(f"{recipe.dataset} was changed while it was indexed: run it again when nothing builds there")
    built = Built(
        version=f"{VERSION}{uuid.uuid4().hex}",
        made_of=made_from,
        tombstones=tombstones,
        rows=sum(files.values()),
        files=files,
        checked=checked,
        seconds=round(time.monotonic() - started, 1),
    )
    for kind, _ in KINDS.values():
        (embeddings / kind).rename(index / kind)
    index.rename(folder / built.version)
    built.publish(folder)
    return built


def _holds_taken_down(recipe: Recipe, folder: Path, built: Built) -> bool:
    is_new = tombstone_files(recipe.folder) != built.tombstones
    return is_new and holds_taken_down(recipe.folder, folder / built.version / "metadata") > 0


def _lay_out(recipe: Recipe, embeddings: Path) -> None:
    """The dataset's embeddings in clip-retrieval's layout. Raises ValueError where that would show what was taken down."""
    if not write_embeddings(recipe.folder, recipe.stages, find_tickets(recipe), Folder(url=str(embeddings))):
        raise ValueError(f"no sample of {recipe.dataset} came through all stages: there is nothing to index")
    if held := holds_taken_down(recipe.folder, embeddings / "metadata"):
        raise ValueError(
            f"{recipe.dataset} still holds {held} samples that were to be taken down: end `densebridge forget` first"
        )


def _sweep(folder: Path, kept: Built | None) -> None:
    """Removes what is not read any more, and what processes that died have left."""
    for path in folder.iterdir():
        if path.name.startswith((VERSION, MAKING)) and not (kept and path.name == kept.version):
            shutil.rmtree(path, ignore_errors=True)


def main(argv: list[str]) -> int:
    """Command line."""
    recipe, options = parse(argv, "index", IndexOptions, __doc__ or "")
    folder = options.folder or default_folder(recipe)
    built, was_there = make_index(recipe, folder, options)
    if options.json:
        print(json.dumps({"folder": str(folder), "was_there": was_there, **asdict(built)}))
        return 0
    state = "up to date" if was_there else f"made in {built.seconds:.0f} s"
    print(f"{folder}: {built.rows:,} samples, {state}")
    for kind, found in built.checked.items():
        print(
            f"  {kind}s: {found['found']:.1%} of sampled rows found by their own vector, recall@10 {found['recall']:.3f}"
        )
    return 0


if __name__ == "__main__":
    from .cli import run

    run("index", sys.argv[1:])
