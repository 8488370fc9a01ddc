"""Show what a build would do and why, and what it would cost. Opens no data file; a list that changed is compared by keys."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

from pipeline.plan import make_plan
from pipeline.reasons import find_work
from stages.ingest import preview

from .build import check_conditions, check_rows
from .display import print_plan
from .estimates import estimate, read_rates
from .recipe import parse


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Options of `densebridge plan`."""

    retry_failed: bool = False
    """Plan for `densebridge build --retry-failed`."""
    json: bool = False
    """Print JSON instead of a table."""


def main(argv: list[str]) -> int:
    """Command line."""
    recipe, options = parse(argv, "plan", PlanOptions, __doc__ or "")
    dataset = recipe.folder
    check_conditions(recipe.stages)
    partitions = preview(dataset, recipe.source)
    plan = make_plan(dataset, recipe.stages, partitions, retry=options.retry_failed)
    work = find_work(dataset, plan)
    costs = estimate(work, read_rates(dataset, recipe.stages))
    if not options.json:
        print_plan(work, costs)
        try:
            check_rows(plan)
        except ValueError as error:
            print(f"a build would refuse: {error}")
        return 0
    told = {}
    for item in work:
        names = ("up_to_date", "to_compute", "rows", "fresh", "reasons")
        cost = costs.get(item.stage.name)
        told[item.stage.name] = {name: getattr(item, name) for name in names} | {
            "seconds": round(cost.seconds, 2) if cost else None,
            "gpu_hours": round(cost.gpu_hours, 4) if cost else None,
        }
    print(json.dumps(told))
    return 0


if __name__ == "__main__":
    from .cli import run

    run("plan", sys.argv[1:])
