"""Rebuild a recipe's dataset: ingest new rows, compute what is missing or changed, pack the views."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from pipeline.funnel import count_funnel
from pipeline.partitions import Partition
from pipeline.plan import Plan, make_plan
from pipeline.reasons import find_work
from pipeline.runner import RunnerName, run_plan
from pipeline.sample import LISTED
from pipeline.settings import write_settings
from pipeline.spelling import nearest
from pipeline.stage import Stage
from pipeline.storage import Folder
from pipeline.tables import read_parquet
from stages.conditions import select_rows
from stages.ingest import ingest
from stages.pack import Pack
from stages.publish import companions_of, publish_view

from .display import StageProgress, print_funnel, print_plan
from .estimates import estimate, read_rates
from .recipe import Recipe, parse, quiet_libraries
from .runs import write_run

# Of planning and working. Each stage that waits for all partitions takes one more, and so does another builder who
# published another table for the same rows.
ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Options of `densebridge build`."""

    runner: RunnerName = "ray"
    """`ray`: a stream of actor pools. `local`: this process alone, for debugging; the same bytes."""
    address: str | None = None
    """A running Ray cluster of which this machine is a node: its head's host:port, or auto; None starts one here."""
    wait_minutes: float | None = None
    """Minutes to wait for nodes that a stage needs and the cluster lacks; None: 20 where an autoscaler may add some, else 0."""
    retry_failed: bool = False
    """Try rows again whose failure may pass: timeouts, refused connections, 429, 5xx. Others stay as they are."""

    def __post_init__(self) -> None:
        if self.wait_minutes is not None and self.wait_minutes < 0:
            raise ValueError(f"wait_minutes cannot be negative, got {self.wait_minutes:g}")


def build(recipe: Recipe, options: BuildOptions) -> None:
    """Does what the plan says is missing, then names each view's present version."""
    started = time.time()
    dataset = recipe.folder
    check_conditions(recipe.stages)
    partitions = ingest(dataset, recipe.source)
    if not partitions:
        raise ValueError(f"source {recipe.source.path} has no row with a URL: there is nothing to build")
    check_source_columns(dataset, recipe.stages, partitions)
    plan = make_plan(dataset, recipe.stages, partitions, retry=options.retry_failed)
    progress = None
    if plan.is_empty:
        print(
            f"{recipe.dataset} is up to date: {len(partitions)} partitions, {len(recipe.stages)} stages, nothing to do"
        )
    else:
        work = find_work(dataset, plan)
        check_rows(plan)
        print_plan(work, estimate(work, read_rates(dataset, recipe.stages)))
        write_settings(dataset, recipe.stages)
        progress = StageProgress(plan)
        try:
            plan = run_rounds(recipe, partitions, plan, options, progress)
        except BaseException:  # also when it is stopped: what it cost is worth knowing
            write_run(dataset, job="build", recipe=recipe, started=started, done=progress.done, funnel={})
            raise
    stages = recipe.stages
    packs = [stage for stage in stages if isinstance(stage, Pack)]
    views = [publish_view(dataset, pack, plan.tickets, companions_of(pack, stages), stages) for pack in packs]
    for view in views:
        print(f"view {view.view}: {view.samples} samples at {view.resolution} px, version {view.version}")
    if progress:
        funnel = count_funnel(dataset, recipe.stages, plan.tickets)
        print_funnel(funnel)
        write_run(dataset, job="build", recipe=recipe, started=started, done=progress.done, funnel=funnel)


def run_rounds(
    recipe: Recipe, partitions: Sequence[Partition], plan: Plan, options: BuildOptions, progress: StageProgress
) -> Plan:
    """Runs the plan, and what then is still missing, until nothing is. Returns the empty plan."""
    dataset = recipe.folder
    with progress:
        for _ in range(ROUNDS + sum(s.whole for s in recipe.stages)):
            run_plan(
                dataset,
                recipe.stages,
                plan,
                progress.report,
                runner=options.runner,
                address=options.address,
                patience=None if options.wait_minutes is None else options.wait_minutes * 60,
            )
            later = plan.retry.intersection(s.name for s in recipe.stages[plan.until :])
            plan = make_plan(dataset, recipe.stages, partitions, retry=later)
            if plan.is_empty:
                return plan
    late = next(s for s in plan.stages if s.to_compute)
    raise ValueError(
        f"after {ROUNDS} rounds {late.to_compute} tables of stage {late.stage.name!r} are still missing: is another "
        "build at work, or something deleting files? Run it again"
    )


def check_conditions(stages: Sequence[Stage]) -> None:
    """Tries the views' conditions on no rows, so that a slip shows now and not after the captions. Raises ValueError."""
    types = {"key": pa.string(), "url": pa.string(), "text": pa.string(), LISTED: pa.bool_()}
    for stage in stages:
        if isinstance(stage, Pack):
            known = pa.schema([(name, types[name]) for name in ("key", *stage.reads) if name in types])
            select_rows(known.empty_table(), stage.config.where, stage.config.view)
        types |= {field.name: field.type for field in stage.writes}


def check_rows(plan: Plan) -> None:
    """Raises ValueError where a stage that has something to do must not do it for so many rows."""
    for stage_plan in plan.stages:
        if stage_plan.to_compute:
            stage_plan.stage.check_rows(sum(stage_plan.given))


def check_source_columns(dataset: Folder, stages: Sequence[Stage], partitions: Sequence[Partition]) -> None:
    """Raises ValueError where a stage reads a column that the source does not have. Looked up in the newest partition."""
    asked = [(stage.name, column) for stage in stages for column in stage.of_source]
    if asked:
        there = read_parquet(dataset, partitions[-1].parquet).column_names
        for stage, column in asked:
            if column not in there:
                near = nearest(column, there)
                raise ValueError(f"stage {stage!r} reads {column!r}, which the source does not have: {near}")


def main(argv: list[str]) -> int:
    """Command line."""
    quiet_libraries()
    build(*parse(argv, "build", BuildOptions, __doc__ or ""))
    return 0


if __name__ == "__main__":
    from .cli import run

    run("build", sys.argv[1:])
