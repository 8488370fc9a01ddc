"""`run.json`: what one execution of a job did, with what configuration, code and versions."""

from __future__ import annotations

import json
import os
import subprocess
import time
import uuid
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline.fingerprint import plain
from pipeline.funnel import FunnelRow
from pipeline.storage import Folder

from .display import Done
from .recipe import Recipe

PACKAGES = (
    "densebridge",
    "torch",
    "transformers",
    "diffusers",
    "accelerate",
    "ray",
    "webdataset",
    "pyarrow",
    "img2dataset",
)


def write_run(
    dataset: Folder,
    *,
    job: str,
    recipe: Recipe,
    started: float,
    done: Mapping[str, Done],
    funnel: Mapping[str, FunnelRow],
) -> str:
    """Publishes `runs/<time>-<id>/run.json` in the dataset folder and returns its name."""
    name = f"runs/{time.strftime('%Y%m%dT%H%M%S', time.gmtime(started))}-{uuid.uuid4().hex[:6]}/run.json"
    record = {
        "job": job,
        "recipe": recipe.name,
        "configuration": {"source": plain(recipe.source), **{s.name: plain(s.config) for s in recipe.stages}},
        "commit": commit(),
        "versions": _versions(),
        "seconds": round(time.time() - started, 2),
        "stages": {
            stage.name: {
                "folder": stage.folder,
                "computed": done[stage.name].rows,
                "busy_seconds": round(done[stage.name].seconds, 2),
                **(funnel[stage.name].as_json() if stage.name in funnel else {}),
            }
            for stage in recipe.stages
            if stage.name in done
        },
    }
    dataset.write(name, json.dumps(record, indent=1).encode())
    return name


def commit() -> str | None:
    """The commit of the code that runs, with `+` where files were changed since; None outside a repository.

    On a cluster the code is a copy without its history, so `densebridge submit` says it in the environment.
    """
    if told := os.environ.get("DENSEBRIDGE_COMMIT"):
        return told
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
