"""What the pipeline costs beside the bare loop over the same model or library: `python -m benchmarks.stages`.

Builds the shapes world once, then takes each stage of its recipe through the engine again (gathering rows, reading
pictures, checking, writing tables and tars) and, in the same process and in turn, through the loop that `bare.py` has
for it, over the same batches. Each stage has a process of its own, so that its peak memory is its own. Prints rows a
second, the median of the paired ratios (1 is free, 0.95 costs 5 %) by processor time, that of processes it starts
included, and by the clock; memory and, last, one line of JSON.

Stages that have neither model nor library are measured without a peer: what they cost is the engine itself.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa

from examples.shapes.recipe import recipe as shapes
from examples.shapes.server import serve
from examples.shapes.source import ShapesSource, write_source
from jobs.recipe import Recipe, quiet_libraries
from pipeline.engine import StageWorker
from pipeline.plan import Ticket, make_plan
from pipeline.rows import gather
from pipeline.runner import run_plan
from stages.ingest import ingest
from stages.pack import Pack

from . import bare


def recipe_in(folder: Path, rows: int, partitions: int) -> Recipe:
    """The shapes recipe over a source of this size."""
    source = replace(shapes.source, path=str(folder / "source.parquet"), partition_size=-(-rows // partitions))
    return replace(shapes, dataset=str(folder / "dataset"), source=source)


def loop_of(stage: Any, folder: Path) -> bare.Loop | None:
    """The stage's work without a pipeline."""
    if isinstance(stage, Pack):
        return bare.pack(stage, folder)
    find = getattr(bare, stage.name.split("_")[0] if stage.name != "clip_filter" else "", None)
    return find(stage) if find else None


def measure(folder: Path, rows: int, partitions: int, index: int, passes: int) -> dict[str, Any]:
    """One stage: seconds of each pass through the engine and of each bare one, over all partitions but the first, which
    warms up.
    """
    recipe = recipe_in(folder, rows, partitions)
    dataset, stage = recipe.folder, recipe.stages[index]
    plan = make_plan(dataset, recipe.stages, ingest(dataset, recipe.source))
    shutil.move(dataset.path(stage.folder), folder / "aside")
    try:
        tickets = [Ticket(partition=t.partition, tables=dict(list(t.tables.items())[:index])) for t in plan.tickets]
        batches = [_batches(recipe, index, ticket) for ticket in tickets]
        parts = [t.partition for t in tickets]
        loop = loop_of(stage, folder)  # on the first partition, to warm up
        if loop:
            loop(batches[0])
        engine, alone = list[tuple[float, float]](), list[tuple[float, float]]()
        for _ in range(1 if stage.ordered or stage.whole else passes):
            shutil.rmtree(dataset.path(stage.folder), ignore_errors=True)
            worker = StageWorker(dataset, [type(s)(s.config) for s in recipe.stages], index, parts)
            worker.work(tickets[0], lambda _: None)
            started = _clocks()
            for ticket in tickets[1:]:
                worker.work(ticket, lambda _: None)
            engine.append(_since(started))
            if loop:
                started = _clocks()
                for part in batches[1:]:
                    loop(part)
                alone.append(_since(started))
        count = sum(b.num_rows for part in batches[1:] for b in part)
    finally:
        shutil.rmtree(dataset.path(stage.folder), ignore_errors=True)
        shutil.move(folder / "aside", dataset.path(stage.folder))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    peak += sum(child.memory_info().rss for child in psutil.Process().children(recursive=True))
    return {"stage": stage.name, "rows": count, "engine": engine, "bare": alone, "peak_mib": peak >> 20}


def _clocks() -> tuple[float, float]:
    """Seconds of processor time, of this process and of those it has started, and by the clock."""
    here = psutil.Process()
    times = [process.cpu_times() for process in (here, *here.children(recursive=True))]
    return sum(t.user + t.system for t in times), time.perf_counter()


def _since(started: tuple[float, float]) -> tuple[float, float]:
    now = _clocks()
    return now[0] - started[0], now[1] - started[1]


def _batches(recipe: Recipe, index: int, ticket: Ticket) -> list[pa.Table]:
    given = gather(recipe.folder, recipe.stages, index, ticket)
    return [batch.table for batch in given.batches(recipe.stages[index].batch_size)]


def show(found: dict[str, Any]) -> dict[str, Any]:
    """One line of the table."""
    rate = found["rows"] / statistics.median(wall for _, wall in found["engine"])
    line = f"{found['stage']:18} {found['rows']:6} {rate:10.0f}"
    result = {"stage": found["stage"], "rows": found["rows"], "rows_per_second": round(rate, 1)}
    if found["bare"]:
        bare_rate = found["rows"] / statistics.median(wall for _, wall in found["bare"])
        cpu, wall = ([b[n] / e[n] for b, e in zip(found["bare"], found["engine"], strict=True)] for n in (0, 1))
        ratios = {"ratio_cpu": round(statistics.median(cpu), 3), "ratio_wall": round(statistics.median(wall), 3)}
        result |= {"bare_rows_per_second": round(bare_rate, 1), **ratios}
        line += f" {bare_rate:10.0f} {statistics.median(cpu):6.2f} [{min(cpu):.2f}, {max(cpu):.2f}]"
        line += f" {statistics.median(wall):6.2f} [{min(wall):.2f}, {max(wall):.2f}]"
    else:
        line += f" {'–':>10} {'–':>6} {'':12} {'–':>6} {'':12}"
    print(f"{line} {found['peak_mib']:8} MiB", flush=True)
    return result | {"peak_mib": found["peak_mib"]}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--partitions", type=int, default=4)
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--only", help=argparse.SUPPRESS)  # what this process is for: "build", or a stage's number
    given = parser.parse_args()
    quiet_libraries()
    if given.only == "build":
        build_all(recipe_in(given.folder, given.rows, given.partitions))
    elif given.only:
        print(json.dumps(measure(given.folder, given.rows, given.partitions, int(given.only), given.passes)))
    else:
        run_all(given.rows, given.partitions, given.passes)


def run_all(rows: int, partitions: int, passes: int) -> None:
    """Each step in a process of its own, started from this small one: a child's peak memory counts from its parent's."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_in(Path(folder), rows, partitions)
        # Pictures that come at once: what is measured is our work, not a server's patience.
        source = ShapesSource(count=rows, missing=0, flaky=0, slow=0, truncated=0, html=0, opt_out=0, tiny=0)
        command = [sys.executable, "-m", "benchmarks.stages", "--folder", folder, "--rows", str(rows)]
        command += ["--partitions", str(partitions), "--passes", str(passes), "--only"]
        with serve(source) as url:
            write_source(source, url, Path(recipe.source.path))
            subprocess.run([*command, "build"], check=True)
            print(
                f"{'stage':18} {'rows':>6} {'rows/s':>10} {'bare':>10} {'by CPU':>6} {'':12} {'wall':>6} {'':12}     peak"
            )
            found = []
            for index in range(len(recipe.stages)):
                done = subprocess.run([*command, str(index)], stdout=subprocess.PIPE, check=True)
                found.append(show(json.loads(done.stdout.splitlines()[-1])))
        print(json.dumps({"benchmark": "stages", "stages": found}))


def build_all(recipe: Recipe) -> None:
    """Every table of the recipe."""
    partitions = ingest(recipe.folder, recipe.source)
    while not (plan := make_plan(recipe.folder, recipe.stages, partitions)).is_empty:
        run_plan(recipe.folder, recipe.stages, plan, lambda _: None, runner="local")


if __name__ == "__main__":
    main()
