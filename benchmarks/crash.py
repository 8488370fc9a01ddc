"""Kills builds at random moments, lets them go on, and compares what they leave with a build that nobody disturbed.

    python -m benchmarks.crash 100 [--rows 300] [--runner local] [--kill build]

A real HTTP server serves the shapes world; a build (all its processes, or with `--kill worker` one of its Ray actors) gets
SIGKILL after a random time, and is then run again, to be killed again or to end. At the end of each round every table
and shard must have the name and the bytes of the undisturbed build's. Stages are the shapes recipe's own, models included.
Prints a line a round, a table and, last, one line of JSON; ends with 1 if a round differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from examples.shapes.server import serve
from examples.shapes.source import ShapesSource, write_source

RECIPE = "examples/shapes/recipe.py"
STAGES = ("Download", "Deduplicate", "Embed", "Recaption", "Score", "Pretokenize", "ClipFilter", "Pack")


class Builds:
    """Builds of one source into folders of their own."""

    def __init__(self, folder: Path, runner: str) -> None:
        self.folder, self._runner = folder, runner

    def start(self, name: str) -> subprocess.Popen[bytes]:
        """A build into the folder `name`, in a session of its own, so that all its processes can be killed together."""
        place = self.folder / name
        place.mkdir(exist_ok=True)
        if not (place / "source.parquet").exists():
            shutil.copy(self.folder / "source.parquet", place)
        environment = {**os.environ, "SHAPES_BUILD": str(place), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment.setdefault("RAY_AUTH_MODE", "disabled")
        command = [sys.executable, "-m", "jobs.cli", "build", RECIPE, "--runner", self._runner]
        with open(place / "log.txt", "ab") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def digests(self, name: str) -> dict[str, str]:
        """Of every table, shard, partition, manifest and pointer. Not of what says when something happened."""
        root = self.folder / name / "dataset"
        files = [p for p in root.rglob("*") if p.is_file() and not p.name.startswith(".")]
        kept = [
            p for p in files if p.relative_to(root).parts[0] not in ("runs", "sources") and p.parent.name != "records"
        ]
        return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in kept}


def kill_build(process: subprocess.Popen[bytes]) -> bool:
    """Kills the build and every process that it started; False where it had ended already."""
    if process.poll() is not None:
        return False
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        try:
            member.kill()
        except psutil.Error:
            continue
    process.wait()
    return True


def kill_worker(process: subprocess.Popen[bytes], dice: random.Random) -> bool:
    """Kills one Ray actor that works on a stage; False where there is none."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
        workers = [p for p in family if any(stage in " ".join(p.cmdline()) for stage in (*STAGES, "_RayStage"))]
    except psutil.Error:
        return False
    if not workers:
        return False
    try:
        dice.choice(workers).send_signal(signal.SIGKILL)
    except psutil.Error:
        return False
    return True


def play(builds: Builds, name: str, dice: random.Random, seconds: float, what: str) -> tuple[int, int]:
    """One round: kills and restarts until a build ends by itself. Returns the kills, and the runs it took."""
    kills = runs = 0
    killed = False
    while True:
        process, runs = builds.start(name), runs + 1
        wait = dice.uniform(0.0, seconds) if kills < 8 else None  # then it may end
        began = time.monotonic()
        while process.poll() is None and (wait is None or time.monotonic() - began < wait):
            time.sleep(0.02)
        if wait is not None and what == "build":
            kills += kill_build(process)
        elif wait is not None:
            while process.poll() is None and not (killed := kill_worker(process, dice)):
                time.sleep(0.1)  # until there is one
            kills += killed
            process.wait()
        if process.poll() == 0:
            return kills, runs
        if process.returncode and process.returncode > 0:
            raise SystemExit(f"the build ended with {process.returncode}: see {builds.folder / name / 'log.txt'}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int, help="kills to reach")
    parser.add_argument("--rows", type=int, default=300, help="rows of the source")
    parser.add_argument("--runner", choices=("ray", "local"), default="local", help="of the builds")
    parser.add_argument("--kill", choices=("build", "worker"), default="build", help="what is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    given = parser.parse_args()
    dice, source = random.Random(given.seed), ShapesSource(count=given.rows, slow=0.0)
    with tempfile.TemporaryDirectory() as folder, serve(source) as url:
        builds = Builds(Path(folder), given.runner)
        write_source(source, url, Path(folder) / "source.parquet")
        began = time.monotonic()
        if builds.start("whole").wait():
            raise SystemExit((Path(folder) / "whole/log.txt").read_text()[-2000:])
        alone, whole = time.monotonic() - began, builds.digests("whole")
        print(f"undisturbed: {alone:.1f} s, {len(whole)} files", flush=True)
        kills = rounds = differing = runs = 0
        while kills < given.kills:
            name = f"round-{rounds}"
            killed, ran = play(builds, name, dice, alone * 0.9, given.kill)
            kills, runs, rounds = kills + killed, runs + ran, rounds + 1
            found = builds.digests(name)
            wrong = sorted(n for n in {*whole, *found} if whole.get(n) != found.get(n))
            differing += bool(wrong)
            print(f"round {rounds}: {killed} kills in {ran} runs, {len(wrong)} files differ {wrong[:3]}", flush=True)
            shutil.rmtree(Path(folder) / name)
    result = {
        "runner": given.runner,
        "kill": given.kill,
        "rows": given.rows,
        "files": len(whole),
        "undisturbed_seconds": round(alone, 1),
        "kills": kills,
        "runs": runs,
        "rounds": rounds,
        "rounds_that_differ": differing,
    }
    print("\n".join(f"{key:<22} {value}" for key, value in result.items()))
    print(json.dumps(result))
    raise SystemExit(1 if differing else 0)


if __name__ == "__main__":
    main()
