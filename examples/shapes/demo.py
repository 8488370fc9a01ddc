"""The whole thing on two cores: `python -m examples.shapes.demo` (or `make demo`).

Starts the world's server, then runs the jobs as anyone would, each as its own `densebridge` command: build, three
trainings (the TSC beside the two controls), evaluation, report. Run again, the build and the trainings find their work
done. Ends with a table, a page and `summary.json`, in which every number was measured in this run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from jobs.cli import one_line

RECIPE = "examples/shapes/recipe.py"
TRAININGS = (("tsc",), ("mlp", "clip_mlp"))  # each row runs on one core, beside the other


@dataclass(kw_only=True)
class Meter:
    """Seconds a step, and the most memory that this process and its children held together (proportional set size)."""

    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Times a step."""
        print(f"\n=== {name}", flush=True)
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(time.perf_counter() - started, 1)
            print(f"=== {name}: {self.seconds[name]:.1f} s", flush=True)

    @contextmanager
    def watching_memory(self) -> Iterator[None]:
        """Samples the memory every two seconds."""
        watcher = threading.Thread(target=self._watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            self._stop.set()
            watcher.join()

    def _watch(self) -> None:
        import psutil

        while not self._stop.wait(2.0):
            total = 0
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:
                    continue
            self.peak_bytes = max(self.peak_bytes, total)


def densebridge(*arguments: str) -> None:
    """Runs one job; its failure ends the demo with the job's own message."""
    code = _start(*arguments).wait()
    if code:
        raise SystemExit(code)


def _start(*arguments: str) -> subprocess.Popen[bytes]:
    threads = "1" if arguments[0] == "train" else "2"  # trainings run side by side, everything else alone
    environment = dict(os.environ, OMP_NUM_THREADS=threads, HF_HUB_OFFLINE="1")
    environment.setdefault("RAY_AUTH_MODE", "disabled")
    return subprocess.Popen([sys.executable, "-m", "jobs.cli", *arguments], env=environment)


def train_all() -> None:
    """The trainings, two at a time."""
    queues = [list(names) for names in TRAININGS]
    running: dict[int, subprocess.Popen[bytes]] = {}
    while running or any(queues):
        for number, queue in enumerate(queues):
            if number not in running and queue:
                running[number] = _start("train", RECIPE, "--training", queue.pop(0))
        for number, process in list(running.items()):
            code = process.poll()
            if code is not None:
                del running[number]
            if code:
                for other in running.values():
                    other.terminate()
                raise SystemExit(code)
        time.sleep(0.2)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=3600, help="rows of the source")
    parser.add_argument("--runner", choices=("ray", "local"), default="ray", help="of the build")
    given = parser.parse_args()
    try:
        demo(given.rows, given.runner)
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"densebridge: {one_line(error)}") from None
    except KeyboardInterrupt:
        raise SystemExit("densebridge: stopped; the same command goes on from there") from None


def demo(rows: int, runner: str) -> None:
    """All of it, on a source of so many rows."""
    from .recipe import BUILD, recipe
    from .server import PORT, serve
    from .source import ShapesSource, write_source
    from .summary import print_summary, summarise

    source, meter, began = ShapesSource(count=rows), Meter(), time.perf_counter()
    BUILD.mkdir(parents=True, exist_ok=True)
    with meter.watching_memory():
        with serve(source, PORT) as url:
            write_source(source, url, Path(recipe.source.path))
            with meter.step("build"):
                densebridge("build", RECIPE, "--runner", runner)
        with meter.step("train"):
            train_all()
        with meter.step("evaluate"):
            densebridge("evaluate", RECIPE)
        with meter.step("report"):
            densebridge("report", RECIPE, "--out", str(BUILD / "report"))
    meter.seconds["total"] = round(time.perf_counter() - began, 1)
    summary = summarise(source, meter.seconds, meter.peak_bytes / 1e9)
    (BUILD / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print_summary(summary)
    print(f"\npage: {BUILD / 'report' / 'index.html'}\nnumbers: {BUILD / 'summary.json'}")


if __name__ == "__main__":
    main()
