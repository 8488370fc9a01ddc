"""What a build would cost, from what earlier builds of the dataset left: seconds of one worker for each row as they recorded
them, the shares of rows that went on and the bytes that they take, as the tables tell them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.plan import Plan
from pipeline.reasons import Work
from pipeline.records import record_name
from pipeline.stage import Stage
from pipeline.storage import Folder
from pipeline.tables import TableName

LEAST = 1.0  # seconds of work: what took less was rounded away, or measured nothing but a start
RUNS = 50  # the latest; in them, those builds count that computed rows of a stage with the same settings, or else any


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The cost of one stage's work."""

    seconds: float
    """Of one worker."""
    gpu_hours: float

    def wall_seconds(self, stage: Stage) -> float:
        """With all the workers that the stage may have."""
        return self.seconds / stage.pool[1]


def read_rates(dataset: Folder, stages: Sequence[Stage]) -> dict[str, float]:
    """Seconds a row by stage name, as the latest builds recorded them; a stage of which none did is left out."""
    rates: dict[str, float] = {}
    other: dict[str, float] = {}
    for run in sorted(dataset.folders("runs"), reverse=True)[:RUNS]:
        told = _stages_of(dataset, run)
        for stage in stages:
            done = told.get(stage.name, {})
            if done.get("computed") and done["busy_seconds"] >= LEAST:
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


def read_shares(plan: Plan) -> dict[str, float]:
    """By stage name the share of its rows that go on, over the tables that the plan found; their names tell it."""
    found = {}
    for stage, tables in _tables_of(plan):
        rows = sum(table.rows for table in tables)
        if rows:
            found[stage.name] = sum(table.kept for table in tables) / rows
    return found


def read_sizes(dataset: Folder, plan: Plan) -> dict[str, float]:
    """By stage name the bytes of tables, tars, records and a view's latest manifest for each row that is kept. Takes a listing
    a stage, and opens no file.
    """
    found = {}
    for stage, tables in _tables_of(plan):
        kept = sum(table.kept for table in tables)
        if not kept:
            continue
        there = dataset.entries(stage.folder)
        sizes = {f"{stage.folder}/{entry.name}": entry.size for entry in there}
        if stage.recorded:
            sizes |= {f"{stage.folder}/records/{e.name}": e.size for e in dataset.entries(f"{stage.folder}/records")}
        names = {name for table in tables for name in (table.parquet, table.tar, record_name(table))}
        manifests = [entry for entry in there if entry.name.startswith("manifest-")]
        latest = max(manifests, key=lambda entry: entry.modified).size if manifests else 0
        found[stage.name] = (sum(sizes.get(name, 0) for name in names) + latest) / kept
    return found


def _tables_of(plan: Plan) -> list[tuple[Stage, list[TableName]]]:
    """Per stage the recipe's tables that are there."""
    stages = [s.stage for s in plan.stages]
    return [(s, [t.tables[s.name] for t in plan.tickets if s.name in t.tables]) for s in stages]


def estimate(work: Sequence[Work], rates: dict[str, float]) -> dict[str, Estimate]:
    """By stage name, for the stages of which a rate is known."""
    found = {}
    for item in work:
        rate = rates.get(item.stage.name, 0.0 if not item.fresh else None)
        if rate is not None:
            seconds = item.fresh * rate
            found[item.stage.name] = Estimate(seconds=seconds, gpu_hours=seconds * item.stage.needs.gpus / 3600)
    return found
