"""Show what a build would do: per stage, partitions that are up to date and to compute. Opens no data file."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

from pipeline.plan import list_partitions, make_plan

from .display import print_plan
from .recipe import parse


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Options of `densebridge plan`."""

    json: bool = False
    """Print JSON instead of a table."""


def main(argv: list[str]) -> int:
    """Command line."""
    recipe, options = parse(argv, "plan", PlanOptions, __doc__ or "")
    partitions = list_partitions(recipe.folder)
    if not partitions and not options.json:
        print(f"{recipe.dataset} holds no partition yet: `densebridge build` first ingests {recipe.source.path}")
    plan = make_plan(recipe.folder, recipe.stages, partitions)
    if options.json:
        names = ("up_to_date", "to_compute", "rows")
        print(json.dumps({s.stage.name: {n: getattr(s, n) for n in names} for s in plan.stages}))
    else:
        print_plan(plan)
    return 0


if __name__ == "__main__":
    from .cli import run

    run("plan", sys.argv[1:])
