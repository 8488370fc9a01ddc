"""Show the funnel of what is built: at every stage, in = kept + dropped by reason + failed by reason."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

from pipeline.funnel import count_funnel
from pipeline.plan import make_plan
from stages.ingest import ingested

from .display import print_funnel
from .recipe import parse


@dataclass(frozen=True, kw_only=True)
class StatusOptions:
    """Options of `densebridge status`."""

    json: bool = False
    """Print JSON instead of a table."""


def main(argv: list[str]) -> int:
    """Command line."""
    recipe, options = parse(argv, "status", StatusOptions, __doc__ or "")
    dataset = recipe.folder
    plan = make_plan(dataset, recipe.stages, ingested(dataset, recipe.source))
    funnel = count_funnel(dataset, recipe.stages, plan.tickets)
    if options.json:
        print(json.dumps({name: row.as_json() for name, row in funnel.items()}))
    else:
        print_funnel(funnel)
    return 0


if __name__ == "__main__":
    from .cli import run

    run("status", sys.argv[1:])
