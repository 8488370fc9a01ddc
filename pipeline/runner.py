"""Runs a plan: every stage over every partition that needs it, in-process or on Ray."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from .compute import Report
from .plan import Plan
from .quarantine import Ledger
from .ray_stream import run_on_ray
from .stage import Stage
from .storage import Folder
from .workers import Job, StageError, work

__all__ = ["RunnerName", "StageError", "run_plan"]

RunnerName = Literal["ray", "local"]


def run_plan(
    dataset: Folder,
    stages: Sequence[Stage],
    plan: Plan,
    report: Report,
    *,
    runner: RunnerName,
    address: str | None = None,
    patience: float | None = None,
) -> None:
    """Does what the plan says is missing, up to a `whole` stage whose rows are not all there yet: the next plan goes on
    from there. `patience`: seconds to wait for nodes that the cluster at `address` lacks, None for some minutes where it may
    grow and else none. Raises StageError; what was published until then stays.
    """
    working = [i for i, s in enumerate(plan.stages[: plan.until]) if s.to_compute]
    tickets = [t for t in plan.tickets if any(stages[i].name not in t.tables for i in working)]
    job = Job(
        dataset=dataset,
        stages=tuple(stages),
        partitions=tuple(t.partition for t in plan.tickets),
        retry=plan.retry,
    )
    if runner == "local":
        workers = [job.worker(i, Ledger()) for i in working]
        for ticket in tickets:
            for worker in workers:
                ticket = work(worker, ticket, report)
    else:
        run_on_ray(job, working, tickets, report, address, patience)
