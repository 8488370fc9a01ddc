"""`run.json`: what one execution of a job did, with what configuration, code and versions."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping

from pipeline.fingerprint import plain
from pipeline.funnel import FunnelRow
from pipeline.storage import Folder
from pipeline.versions import commit, versions

from .display import Done
from .recipe import Recipe


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
        "versions": versions(),
        "seconds": round(time.time() - started, 2),
        "stages": {
            stage.name: {
                "folder": stage.folder,
                "computed": done[stage.name].rows,
                "busy_seconds": round(done[stage.name].seconds, 4),
                **(funnel[stage.name].as_json() if stage.name in funnel else {}),
            }
            for stage in recipe.stages
            if stage.name in done
        },
    }
    dataset.write(name, json.dumps(record, indent=1).encode())
    return name
