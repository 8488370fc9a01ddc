"""What Ray takes beside the stages, how well they overlap, and what more nodes are worth; held against `densebridge cost`.

    python -m benchmarks.scaling [--nodes 1 2 4] [--partitions 128] [--size 5000] [--shrink 100]

The real runner, engine and storage build a dataset on simulated nodes (raylets here with pretended cores and GPUs). Its
stages sleep as long as real ones would work: 50 pictures a second by a core that downloads, 10 captions and 900 scores a second
by a GPU. To end in minutes, partitions and batches hold a `--shrink`-th of the rows: a partition of 50 rows at these speeds takes
a hundredth of one of 5,000, in as many batches. What Ray takes for a partition does not shrink with its rows, so it is measured
in milliseconds, and set against the time of a whole partition. The engine's work by the row (tables, tars) shrinks with them:
`benchmarks/stages.py` measures that.

Actors are started before the clock is. Prints a table and, last, one line of JSON; ends with 1 where, at the real size,
Ray and the engine take more than 3 % of the time, or a build takes 10 % longer than its slowest stage or than predicted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.costs.model import Figure, Figures, StageCost, Wall, cost_stages, critical_path
from pipeline.plan import make_plan
from pipeline.runner import RunnerName, run_plan
from pipeline.stage import Needs, Stage
from pipeline.storage import Folder
from stages.ingest import ingest
from stages.source import Source

from .nodes import Node
from .sleepers import Caption, Download, Score, Sleeper, SleeperConfig

RATES = {"download": 50.0, "caption": 10.0, "score": 900.0}
KEEP = {"download": 0.9, "caption": 1.0, "score": 1.0}
BATCHES = {"download": 256, "caption": 512, "score": 256}
NEEDS = {  # of an actor, and how many of them a node has: two GPUs and a core for downloads
    "download": (Needs(cpus=1.0), 1),
    "caption": (Needs(cpus=0.5, gpus=0.9), 2),
    "score": (Needs(cpus=0.5, gpus=0.1), 1),
}
CPUS, GPUS = 4, 2  # of a node
OVERHEAD, BEHIND, OFF = 0.03, 0.1, 0.1
"""What is allowed at the real size: Ray's and the engine's share of the time, how much longer than the slowest stage by itself
a build may take, and how far off the prediction of it may be."""
KINDS: tuple[type[Sleeper], ...] = (Download, Caption, Score)
ENDLESS = 1e12  # rows a second of a stage that does not sleep


@dataclass(frozen=True, kw_only=True)
class Work:
    """When an actor was at work on one batch."""

    began: float
    ended: float
    rows: int


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of a build."""

    partitions: int
    size: int
    """Rows of a real partition."""
    shrink: int
    """How many times fewer rows a partition here has."""

    @property
    def rows(self) -> int:
        """Of a partition here."""
        return max(1, self.size // self.shrink)


def make_stages(sizes: Sizes, notes: Path, nodes: int, *, asleep: bool = True) -> tuple[Stage, ...]:
    """The three stages with pools for so many nodes; awake ones only pass on what they are given."""
    found = []
    for kind in KINDS:
        needs, count = NEEDS[kind.name]
        config = SleeperConfig(
            rate=RATES[kind.name] if asleep else ENDLESS,
            notes=str(notes),
            keep=KEEP[kind.name],
            batch_size=max(1, BATCHES[kind.name] // sizes.shrink),
            needs=Needs(cpus=needs.cpus, gpus=needs.gpus, actors=(count * nodes, count * nodes)),
        )
        found.append(kind(config))
    return tuple(found)


def predict(stages: Sequence[Stage], sizes: Sizes) -> tuple[list[StageCost], Wall]:
    """What the cost model says of these stages at their stated rates."""
    figures = {
        s.name: Figures(
            keep=Figure(value=KEEP[s.name], origin="stated"), rate=Figure(value=RATES[s.name], origin="stated")
        )
        for s in stages
    }
    costs = cost_stages(stages, figures, rows=sizes.partitions * sizes.rows, partitions=sizes.partitions)
    return costs, critical_path(costs, sizes.partitions)


def build(stages: Sequence[Stage], sizes: Sizes, folder: Path, runner: RunnerName) -> float:
    """Builds a dataset of so many rows in `folder`; seconds from the call to its end."""
    table = folder / "source.parquet"
    urls = [f"http://example.org/{n}" for n in range(sizes.partitions * sizes.rows)]
    pq.write_table(pa.table({"url": urls, "text": [""] * len(urls)}), table)
    dataset = Folder(url=str(folder / "dataset"))
    partitions = ingest(dataset, Source(path=str(table), partition_size=sizes.rows))
    plan = make_plan(dataset, stages, partitions)
    began = time.monotonic()
    run_plan(dataset, stages, plan, lambda _: None, runner=runner)
    spent = time.monotonic() - began
    if not make_plan(dataset, stages, partitions).is_empty:
        raise RuntimeError("the build left something undone")
    return spent


@contextmanager
def simulated_cluster(nodes: int) -> Iterator[None]:
    """So many raylets on this machine, and this process connected to them."""
    import ray

    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": os.getcwd()}
    with ExitStack() as ending:
        head: Node | None = None
        for _ in range(nodes):
            folder = ending.enter_context(
                tempfile.TemporaryDirectory(prefix="scaling", dir="/tmp", ignore_cleanup_errors=True)
            )
            node = Node(Path(folder), environment, cpus=CPUS, gpus=GPUS, head=head)
            ending.callback(node.kill)
            head = head or node
        ending.callback(ray.shutdown)
        ray.init(address=head.address if head else None, log_to_driver=False, logging_level="ERROR")
        # So that no actor's start is taken for scheduling: the stream begins when all are there.
        ray.data.DataContext.get_current().wait_for_min_actors_s = 300
        yield


def read_notes(folder: Path) -> dict[str, dict[str, list[Work]]]:
    """By stage and actor what it worked on, in order."""
    found: dict[str, dict[str, list[Work]]] = defaultdict(dict)
    for path in sorted(folder.iterdir()):
        stage, actor = path.name.split(".")
        lines = (line.split() for line in path.read_text().splitlines())
        found[stage][actor] = [Work(began=float(a), ended=float(b), rows=int(n)) for a, b, n in lines]
    return found


def figures_of(
    notes: dict[str, dict[str, list[Work]]],
    sizes: Sizes,
    *,
    costs: Sequence[StageCost],
    predicted: Wall,
    engine_seconds: float,
) -> dict[str, float]:
    """What one build's notes tell. `engine_seconds`: what the engine takes for a stage and partition without Ray.

    Between an actor's partitions lie Ray and the engine: `gap_ms`; and they make an actor's first one later than its row's way
    through the stages before: `fill_ms`. At the real size these stay and all else is `shrink` times as long, so the shares
    `at_size` follow. The stage is the slowest, which the others wait for.
    """
    everything = [work for actors in notes.values() for works in actors.values() for work in works]
    start = min(w.began for w in everything)
    wall = max(w.ended for w in everything) - start
    actors = notes[predicted.slowest]
    pool = next(cost.actors for cost in costs if cost.stage.name == predicted.slowest)
    busy = sum(work.ended - work.began for works in actors.values() for work in works)
    own = busy / pool
    waited = sum(works[-1].ended - works[0].began for works in actors.values()) - busy
    gap = waited / max(1, sizes.partitions - len(actors))
    rounds = sizes.partitions / pool
    firsts = sorted(works[0].began - start for works in actors.values())
    fill = max(0.0, mean(firsts) - mean(_first_begins(costs, predicted.slowest, sizes.partitions)[: len(firsts)]))
    overhead = gap * rounds + fill  # of the critical path, which is this stage's
    wall_at_size = sizes.shrink * (wall - overhead) + overhead
    seconds = {name: sum(w.ended - w.began for works in by.values() for w in works) for name, by in notes.items()}
    return {
        "wall_seconds": wall,
        "predicted_wall_seconds": predicted.seconds,
        "slowest_own_seconds": own,
        "gap_ms": 1000 * gap,
        "engine_ms": 1000 * engine_seconds,
        "ray_ms": 1000 * max(0.0, gap - engine_seconds),
        "fill_ms": 1000 * fill,
        "overhead_share_here": overhead / wall,
        "overhead_share_at_size": overhead / wall_at_size,
        "over_slowest_here": wall / own - 1,
        "over_slowest_at_size": wall_at_size / (sizes.shrink * own) - 1,
        "off_prediction_at_size": wall_at_size / (sizes.shrink * predicted.seconds) - 1,
        **{f"{c.stage.name}_worker_seconds": seconds[c.stage.name] for c in costs},
        **{f"{c.stage.name}_predicted_seconds": c.seconds or 0.0 for c in costs},
    }


def _first_begins(costs: Sequence[StageCost], stage: str, partitions: int) -> list[float]:
    """When each of the stage's actors would get its first partition if nothing but the stages before took time: these hand on
    as many at a time as they have actors.
    """
    names = [cost.stage.name for cost in costs]
    pool, before = costs[names.index(stage)].actors, costs[: names.index(stage)]
    return [
        sum(math.ceil((actor + 1) / cost.actors) * (cost.seconds or 0.0) / partitions for cost in before)
        for actor in range(pool)
    ]


def engine_alone(sizes: Sizes) -> float:
    """Seconds of the engine for a stage and partition, in this process, where nobody sleeps: mean over the three stages."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        notes = folder / "notes"
        notes.mkdir()
        spent = build(make_stages(sizes, notes, 1, asleep=False), sizes, folder, "local")
    return spent / sizes.partitions / len(KINDS)


def measure(nodes: int, sizes: Sizes, engine_seconds: float) -> dict[str, float]:
    """One build on so many nodes."""
    with tempfile.TemporaryDirectory() as temporary, simulated_cluster(nodes):
        folder = Path(temporary)
        notes = folder / "notes"
        notes.mkdir()
        stages = make_stages(sizes, notes, nodes)
        spent = build(stages, sizes, folder, "ray")
        costs, predicted = predict(stages, sizes)
        found = figures_of(read_notes(notes), sizes, costs=costs, predicted=predicted, engine_seconds=engine_seconds)
    return {**found, "start_seconds": spent - found["wall_seconds"]}


def is_good(found: dict[str, float]) -> bool:
    """Whether a build's figures are within what is allowed."""
    return (
        found["overhead_share_at_size"] <= OVERHEAD
        and found["over_slowest_at_size"] <= BEHIND
        and abs(found["off_prediction_at_size"]) <= OFF
    )


def print_table(results: dict[int, dict[str, float]], sizes: Sizes) -> None:
    """A line a figure, a column a number of nodes."""
    print(f"{sizes.partitions} partitions of {sizes.size} rows, shrunk {sizes.shrink} times; sleeping stages")
    print(f"{'nodes':<28}" + "".join(f"{nodes:>12}" for nodes in results))
    for name in next(iter(results.values())):
        print(f"{name:<28}" + "".join(f"{found[name]:>12.4g}" for found in results.values()))


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4], help="simulated nodes, a build each")
    parser.add_argument("--partitions", type=int, default=128, help="of each build")
    parser.add_argument("--size", type=int, default=5000, help="rows of a real partition")
    parser.add_argument("--shrink", type=int, default=100, help="how many times fewer rows a partition here has")
    given = parser.parse_args(argv)
    sizes = Sizes(partitions=given.partitions, size=given.size, shrink=given.shrink)
    engine_seconds = engine_alone(sizes)
    results: dict[int, dict[str, float]] = {}
    for nodes in given.nodes:
        results[nodes] = measure(nodes, sizes, engine_seconds)
        first = results[given.nodes[0]]["wall_seconds"]
        results[nodes]["speed_up"] = first / results[nodes]["wall_seconds"]
    print_table(results, sizes)
    rounded = {nodes: {k: round(v, 5) for k, v in found.items()} for nodes, found in results.items()}
    print(json.dumps({"partitions": sizes.partitions, "size": sizes.size, "shrink": sizes.shrink, "nodes": rounded}))
    raise SystemExit(0 if all(is_good(found) for found in results.values()) else 1)


if __name__ == "__main__":
    main()
