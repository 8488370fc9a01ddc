"""What a build would cost, from what earlier builds of the dataset recorded: seconds of one worker for each row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.reasons import Work
from pipeline.stage import Stage
from pipeline.storage import Folder

RUNS = 10  # the latest; older ones had other machines and other models


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The cost of one stage's work."""

    seconds: float
    """Of one worker."""
    gpu_hours: float

    def wall_seconds(self, stage: Stage) -> float:
        """With all the workers that the stage may have."""
        return self.seconds / (1 if stage.ordered else stage.needs.actors[1])


def read_rates(dataset: Folder) -> dict[str, float]:
    """Seconds a row by stage name, over the latest builds that computed rows of it."""
    seconds: dict[str, float] = {}
    rows: dict[str, int] = {}
    for run in sorted(dataset.folders("runs"), reverse=True)[:RUNS]:
        try:
            stages = json.loads(dataset.read(f"runs/{run}/run.json")).get("stages", {})
        except FileNotFoundError:  # another builder has only made the folder yet
            continue
        for name, told in stages.items():
            rows[name] = rows.get(name, 0) + told.get("computed", 0)
            seconds[name] = seconds.get(name, 0.0) + told.get("busy_seconds", 0.0)
    return {name: seconds[name] / count for name, count in rows.items() if count}


def estimate(work: Sequence[Work], rates: dict[str, float]) -> dict[str, Estimate]:
    """By stage name, for the stages of which a rate is known."""
    found = {}
    for item in work:
        rate = rates.get(item.stage.name, 0.0 if not item.fresh else None)
        if rate is not None:
            seconds = item.fresh * rate
            found[item.stage.name] = Estimate(seconds=seconds, gpu_hours=seconds * item.stage.needs.gpus / 3600)
    return found
