"""Show what a build and its trainings would take at a size: hours of GPUs and cores, storage, requests, time, and money at your
prices. Every number says whether it was measured in this dataset, stated, or assumed.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.plan import make_plan
from stages.ingest import ingested

from .costs.figures import Stated, phase_costs, read_pair, read_pairs, source_size, stage_figures
from .costs.model import Costs, Prices, StageCost, cost_stages, critical_path
from .costs.table import print_costs
from .recipe import Recipe, parse


@dataclass(frozen=True, kw_only=True)
class CostOptions:
    """Options of `densebridge cost`. What has no price is told as a quantity and is in no sum."""

    rows: float | None = None
    """Rows of the source, such as 34e6. None: as many as the dataset's partitions have."""
    gpu: str | None = None
    """What an hour of a GPU costs, with the GPU's name: a100=2.0."""
    gpus: float | None = None
    """GPUs that the cluster has. None: as many as the pools of the recipe may take."""
    cpus: float | None = None
    """Cores that the cluster has. None: as many as the pools may take."""
    keep: tuple[str, ...] = ()
    """Shares of the rows that go on: download=0.7 clip_filter=0.6."""
    rate: tuple[str, ...] = ()
    """Rows a second of one actor: recaption=10. Of a training, or its first phase, samples a second of one GPU: tsc.0=25."""
    size: tuple[str, ...] = ()
    """Bytes of a stage's files for each row that it keeps: download=80e3."""
    cpu_hour: float | None = None
    """What an hour of a core costs."""
    storage_month: float | None = None
    """What a GB costs a month in the dataset folder."""
    requests_million: tuple[float, float] | None = None
    """What a million requests cost: GET and HEAD, then PUT, POST and LIST, which stores charge more for. S3's: 0.4 5."""
    egress: float | None = None
    """What a GB costs that the workers read from the dataset folder, where it lies elsewhere than they run."""
    json: bool = False
    """Print JSON instead of a table."""

    def __post_init__(self) -> None:
        for name in ("rows", "gpus", "cpus"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be above 0, got {value}")
        for name in ("cpu_hour", "storage_month", "egress"):
            if (price := getattr(self, name)) is not None and not 0 <= price < math.inf:
                raise ValueError(f"{name} is a price and cannot be {price}")
        if self.requests_million and not all(0 <= price < math.inf for price in self.requests_million):
            raise ValueError(f"requests_million are prices and cannot be {self.requests_million}")

    @property
    def prices(self) -> Prices:
        """As stated."""
        reads, writes = self.requests_million or (None, None)
        return Prices(
            gpu_hour=read_pair("--gpu", self.gpu)[1] if self.gpu else None,
            cpu_hour=self.cpu_hour,
            million_reads=reads,
            million_writes=writes,
            gb_read=self.egress,
            gb_month=self.storage_month,
        )


def find_costs(recipe: Recipe, options: CostOptions) -> Costs:
    """What the recipe's build and trainings would take, whatever is there already. Raises ValueError in one line."""
    trainings = [name for t, c in recipe.trainings.items() for name in (t, *(f"{t}.{n}" for n in range(len(c.phases))))]
    stages = [stage.name for stage in recipe.stages]
    stated = Stated(
        rates=read_pairs("--rate", options.rate, [*stages, *trainings]),
        keep=read_pairs("--keep", options.keep, stages, most=1.0),
        sizes=read_pairs("--size", options.size, stages),
    )
    dataset = recipe.folder
    plan = make_plan(dataset, recipe.stages, ingested(dataset, recipe.source))
    rows = options.rows or sum(ticket.partition.rows for ticket in plan.tickets)
    if not rows:
        raise ValueError(f"{recipe.dataset} has no partitions yet: say for how many rows, such as --rows 34e6")
    partitions = math.ceil(rows / recipe.source.partition_size)
    found = cost_stages(recipe.stages, stage_figures(dataset, plan, stated), rows=rows, partitions=partitions)
    return Costs(
        rows=rows,
        partitions=partitions,
        source=source_size(dataset, plan),
        stages=found,
        phases=phase_costs(recipe, stated.rates),
        wall=critical_path(found, partitions, gpus=options.gpus, cpus=options.cpus),
    )


def as_json(costs: Costs, prices: Prices) -> dict[str, Any]:
    """Everything that the table tells, with the prices."""
    return {
        "rows": costs.rows,
        "partitions": costs.partitions,
        "stages": {cost.stage.name: _stage_json(cost, prices) for cost in costs.stages},
        "trainings": {
            phase.name: {
                "samples": phase.samples,
                "rate": asdict(phase.rate) if phase.rate else None,
                "gpu_hours": phase.gpu_hours,
                "money": prices.total(gpu_hours=phase.gpu_hours),
            }
            for phase in costs.phases
        },
        "total": {
            "gpu_hours": costs.gpu_hours,
            "held_gpu_hours": costs.held_gpu_hours,
            "cpu_hours": costs.cpu_hours,
            "stored_bytes": costs.stored_bytes,
            "requests": asdict(costs.requests),
            "wall_seconds": costs.wall.seconds,
            "slowest": costs.wall.slowest,
            "limit": costs.wall.limit,
            "money": costs.money(prices) if prices.any_once else None,
            "money_a_month": prices.month(costs.stored_bytes),
        },
        "without_rate": costs.without_rate,
        "prices": asdict(prices),
    }


def _stage_json(cost: StageCost, prices: Prices) -> dict[str, Any]:
    figures = {
        name: asdict(told) if (told := getattr(cost.figures, name)) else None for name in ("keep", "rate", "size")
    }
    names = ("rows", "seconds", "gpu_hours", "cpu_hours", "stored_bytes", "read_bytes", "actors", "wall_seconds")
    return {
        **figures,
        **{name: getattr(cost, name) for name in names},
        "requests": asdict(cost.requests),
        "money": prices.of(cost) if prices.any_once else None,
        "money_a_month": prices.month(cost.stored_bytes),
    }


def main(argv: list[str]) -> int:
    """Command line."""
    recipe, options = parse(argv, "cost", CostOptions, __doc__ or "")
    prices = options.prices
    costs = find_costs(recipe, options)
    if options.json:
        print(json.dumps(as_json(costs, prices)))
    else:
        print_costs(costs, prices, gpu=options.gpu.partition("=")[0] if options.gpu else "GPU")
    return 0


if __name__ == "__main__":
    from .cli import run

    run("cost", sys.argv[1:])
