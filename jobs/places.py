"""Where a submitted job reads and writes: places that outlive it. Its copy of the repository does not."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .recipe import Recipe

VARIABLES = ("DENSEBRIDGE_SOURCE", "DENSEBRIDGE_DATASET", "DENSEBRIDGE_RUNS", "DENSEBRIDGE_CONTACT")
"""What tells the recipes their places: where it is set here, a submitted job is told too."""
SUBMITTED = "DENSEBRIDGE_SUBMITTED"
"""Set in a submitted job: it checks its places itself, as those that only its nodes know are not known where it comes from."""
WRITES = {"report": "--out", "generate": "--out", "export": "--out", "embeddings": "--folder"}
"""By job the flag that says where its results go, if not among the runs or in the dataset."""
_RUNS = ("train", "generate", "export", "evaluate", "report", "index")


def check_places(job: str, recipe: Recipe, flags: Sequence[str]) -> None:
    """Raises ValueError for folders that would be thrown away with the job's copy of the repository."""
    if recipe.folder.is_local and not Path(recipe.dataset.removeprefix("file://")).is_absolute():
        raise ValueError(f"dataset {recipe.dataset!r} is relative: give s3://… or an absolute path that nodes share")
    if job in _RUNS and not Path(recipe.runs).is_absolute():
        raise ValueError(f"runs {recipe.runs!r} is relative: give an absolute path that outlives the job")
    if flag := WRITES.get(job):
        given = [value for name, value in pairwise(flags) if name == flag]
        given += [name.removeprefix(f"{flag}=") for name in flags if name.startswith(f"{flag}=")]
        if not any(value.startswith("/") or "://" in value for value in given):
            raise ValueError(f"{job} would write into the job's own copy: give {flag} an absolute path, after --")
