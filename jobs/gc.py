"""Show what no recipe given can reach any more, and delete it with --delete. Several recipes of one dataset can be given:
what any of them reaches stays. Flags of stages count for the first recipe.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from pipeline.garbage import Garbage, delete_garbage, find_garbage, survey
from pipeline.plan import make_plan
from stages.ingest import ingested
from stages.pack import Pack

from .display import console
from .recipe import Recipe, load_recipe, parse

CHECKPOINTS = "*/checkpoint-*/checkpoint.json"
"""Of the training runs, in their folder."""


@dataclass(frozen=True, kw_only=True)
class GcOptions:
    """Options of `densebridge gc`."""

    recipes: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="[RECIPE ...]")]] = ()
    """Further recipes of the same dataset."""
    delete: bool = False
    """Delete what is listed; without it nothing is."""
    min_age_hours: float = 1.0
    """What is younger stays, because a build may be writing it. 0 only while none runs."""
    json: bool = False
    """Print JSON, with every file's path, instead of a table."""

    def __post_init__(self) -> None:
        if self.min_age_hours < 0:
            raise ValueError(f"min_age_hours cannot be negative, got {self.min_age_hours}")


def collect(recipes: Sequence[Recipe], options: GcOptions) -> list[Garbage]:
    """What none of the recipes reaches; deleted where the options say so."""
    dataset = recipes[0].folder
    for recipe in recipes:
        if recipe.folder.path("") != dataset.path(""):
            raise ValueError(
                f"recipe {recipe.name!r} has the dataset folder {recipe.dataset}, and {recipes[0].name!r} has "
                f"{recipes[0].dataset}: give recipes of one folder"
            )
    there = survey(dataset)
    garbage = find_garbage(
        dataset,
        there,
        [make_plan(dataset, recipe.stages, ingested(dataset, recipe.source)) for recipe in recipes],
        views={view for recipe in recipes for view in views_of(recipe)},
        manifests={digest for recipe in recipes for digest in trained_manifests(Path(recipe.runs))},
        min_age=options.min_age_hours * 3600,
    )
    if options.delete:
        delete_garbage(dataset, garbage)
    return garbage


def views_of(recipe: Recipe) -> set[str]:
    """The views that the recipe packs, trains on, or validates with."""
    found = {stage.config.view for stage in recipe.stages if isinstance(stage, Pack)}
    for training in recipe.trainings.values():
        found |= {view for phase in training.phases for view in phase.views}
        if training.validation and training.validation.view:
            found.add(training.validation.view)
    return found


def trained_manifests(runs: Path) -> set[str]:
    """sha256 of the view manifests that the training runs' checkpoints were made with: a run goes on with no other, and while it
    runs it reads the held-out view that it began with.
    """
    found = set()
    for path in runs.glob(CHECKPOINTS):
        with suppress(ValueError, KeyError):  # a damaged checkpoint, from which no run goes on
            checkpoint = json.loads(path.read_bytes())
            views = [view for phase in checkpoint["facts"]["phases"] for view in phase["views"].values()]
            held_out = checkpoint["state"].get("held_out")
            found |= {view["manifest_sha256"] for view in views} | ({held_out} if held_out else set())
    return found


def print_checkpoints(recipes: Sequence[Recipe]) -> None:
    """How many checkpoints hold old view versions, and where: for one that lies elsewhere nothing stays."""
    for runs in sorted({Path(recipe.runs).absolute() for recipe in recipes}):
        print(f"{sum(1 for _ in runs.glob(CHECKPOINTS))} checkpoints found in {runs}")


def print_garbage(garbage: Sequence[Garbage], deleted: bool) -> None:
    """A line for each folder and reason, and the sum."""
    table = Table(title="deleted" if deleted else "would be deleted", title_justify="left")
    for name in ("folder", "files", "bytes", "why"):
        table.add_column(name, justify="right" if name in ("files", "bytes") else "left")
    for item in garbage:
        table.add_row(Text(item.folder), str(len(item.files)), decimal(item.size), Text(item.why))
    if garbage:
        console.print(table)
    files, size = sum(len(item.files) for item in garbage), decimal(sum(item.size for item in garbage))
    if not garbage:
        print("nothing to delete")
    else:
        print(f"{files} files, {size}" + ("" if deleted else ": nothing was deleted, add --delete"))


def main(argv: list[str]) -> int:
    """Command line."""
    first, options = parse(argv, "gc", GcOptions, __doc__ or "", words="RECIPE [RECIPE ...]")
    recipes = [first, *map(load_recipe, options.recipes)]
    garbage = collect(recipes, options)
    if options.json:
        items = [{"folder": g.folder, "why": g.why, "files": g.files, "bytes": g.size} for g in garbage]
        print(json.dumps({"deleted": options.delete, "bytes": sum(g.size for g in garbage), "garbage": items}))
    else:
        print_checkpoints(recipes)
        print_garbage(garbage, options.delete)
    return 0


if __name__ == "__main__":
    from .cli import run

    run("gc", sys.argv[1:])
