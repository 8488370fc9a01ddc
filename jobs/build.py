"""Rebuild a recipe's dataset: ingest new rows, compute what is missing or changed, pack the views."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from pipeline.funnel import count_funnel
from pipeline.plan import make_plan
from pipeline.runner import RunnerName, run_plan
from pipeline.stage import Stage
from stages.ingest import ingest
from stages.pack import Pack, publish_view, select_rows

from .display import StageProgress, print_funnel, print_plan
from .recipe import Recipe, parse, quiet_libraries
from .runs import write_run


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Options of `densebridge build`."""

    runner: RunnerName = "ray"
    """`ray`: a stream of actor pools. `local`: this process alone; the same bytes."""
    address: str | None = None
    """Address of a running Ray cluster; None starts one on this machine."""


def build(recipe: Recipe, options: BuildOptions) -> None:
    """Does what the plan says is missing, then names each view's present version."""
    started = time.time()
    dataset = recipe.folder
    check_conditions(recipe.stages)
    partitions = ingest(dataset, recipe.source)
    if not partitions:
        raise ValueError(f"source {recipe.source.path} has no row with a URL: there is nothing to build")
    plan = make_plan(dataset, recipe.stages, partitions)
    seconds: dict[str, float] = {}
    if plan.is_empty:
        print(
            f"{recipe.dataset} is up to date: {len(partitions)} partitions, {len(recipe.stages)} stages, nothing to do"
        )
    else:
        print_plan(plan)
        with StageProgress(plan) as progress:
            run_plan(dataset, recipe.stages, plan, progress.report, runner=options.runner, address=options.address)
        seconds = progress.seconds
        plan = make_plan(dataset, recipe.stages, partitions)
        if not plan.is_empty:
            raise ValueError("the build ended but some tables are missing: run it again")
    views = [publish_view(dataset, s, plan.tickets) for s in recipe.stages if isinstance(s, Pack)]
    for view in views:
        print(f"view {view.view}: {view.samples} samples at {view.resolution} px, version {view.version}")
    if seconds:
        funnel = count_funnel(dataset, recipe.stages, plan.tickets)
        print_funnel(funnel)
        write_run(dataset, job="build", recipe=recipe, started=started, stage_seconds=seconds, funnel=funnel)


def check_conditions(stages: Sequence[Stage]) -> None:
    """Tries the views' conditions on no rows, so that a slip shows now and not after the captions. Raises ValueError."""
    types = {"key": pa.string(), "url": pa.string(), "text": pa.string()}
    for stage in stages:
        if isinstance(stage, Pack):
            known = pa.schema([(name, types[name]) for name in ("key", *stage.reads) if name in types])
            select_rows(known.empty_table(), stage.config.where, stage.config.view)
        types |= {field.name: field.type for field in stage.writes}


def main(argv: list[str]) -> int:
    """Command line."""
    quiet_libraries()
    build(*parse(argv, "build", BuildOptions, __doc__ or ""))
    return 0


if __name__ == "__main__":
    from .cli import run

    run("build", sys.argv[1:])
