"""What a build would cost, from what earlier builds of the dataset recorded: seconds of one worker for each row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.reasons import Work
from pipeline.stage import Stage
from pipeline.storage import Folder

RUNS = 50  # the latest; in them, those builds count that computed rows of a stage with the same settings, or else any


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The cost of one stage's work."""

    seconds: float
    """Of one worker."""
    gpu_hours: float

    def wall_seconds(self, stage: Stage) -> float:
        """With all the workers that the stage may have."""
        return self.seconds / (1 if stage.ordered else stage.needs.actors[1])


def read_rates(dataset: Folder, stages: Sequence[Stage]) -> dict[str, float]:
    """Seconds a row by stage name, as the latest builds recorded them; a stage of which none did is left out."""
    rates: dict[str, float] = {}
    other: dict[str, float] = {}
    for run in sorted(dataset.folders("runs"), reverse=True)[:RUNS]:
        told = _stages_of(dataset, run)
        for stage in stages:
            done = told.get(stage.name, {})
            if done.get("computed"):
                same = rates if done.get("folder") == stage.folder else other
                same.setdefault(stage.name, done["busy_seconds"] / done["computed"])
        if len(rates) == len(stages):
            break
    return {**other, **rates}


def _stages_of(dataset: Folder, run: str) -> dict[str, dict[str, Any]]:
    try:
        return json.loads(dataset.read(f"runs/{run}/run.json"))["stages"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # another job's, or damaged: it only informs
        return {}


def estimate(work: Sequence[Work], rates: dict[str, float]) -> dict[str, Estimate]:
    """By stage name, for the stages of which a rate is known."""
    found = {}
    for item in work:
        rate = rates.get(item.stage.name, 0.0 if not item.fresh else None)
        if rate is not None:
            seconds = item.fresh * rate
            found[item.stage.name] = Estimate(seconds=seconds, gpu_hours=seconds * item.stage.needs.gpus / 3600)
    return found
