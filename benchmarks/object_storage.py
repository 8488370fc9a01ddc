"""The whole shapes build in a store of objects with bad moments, beside one on this machine's disk.

    python -m benchmarks.object_storage [--rows 200] [--every 10] [--slow 2.0] [--runner ray]

Three builds through the command anyone would give: on the disk, in an S3-compatible server on this machine (needs the extra
`benchmarks`), and in it behind a proxy that strikes one of `--every` requests: a quarter of these each is answered 503
SlowDown, is cut off before it is answered, is answered by half, takes `--slow` seconds more. Stages are the shapes recipe's
own, models included. Prints a table and, last, one line of JSON; ends with 1 where a file's bytes differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from examples.shapes.server import serve
from examples.shapes.source import ShapesSource, write_source
from pipeline.storage import Folder

from .unreliable_store import unreliable_store

RECIPE = """
import os
from dataclasses import replace
from examples.shapes.recipe import recipe as shapes
recipe = replace(shapes, dataset=os.environ["DATASET"], source=replace(shapes.source, partition_size=50))
"""


def digests(dataset: Folder) -> dict[str, str]:
    """Of every table, shard, partition, manifest and pointer. Not of what says when something happened."""
    found, folders = {}, [""]
    while folders:
        folder = folders.pop()
        inner = [f"{folder}/{name}".lstrip("/") for name in dataset.folders(folder)]
        folders += [name for name in inner if name not in ("runs", "sources") and not name.endswith("/records")]
        for name in dataset.list(folder):
            path = f"{folder}/{name}".lstrip("/")
            found[path] = hashlib.sha256(dataset.read(path)).hexdigest()
    return found


def build(folder: Path, dataset: str, runner: str, variables: dict[str, str]) -> float:
    """Seconds of one build in a process of its own."""
    (folder / "recipe.py").write_text(RECIPE)
    ours = {"SHAPES_BUILD": str(folder), "DATASET": dataset, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment = {"RAY_AUTH_MODE": "disabled", **os.environ, **ours, **variables}
    command = [sys.executable, "-m", "jobs.cli", "build", str(folder / "recipe.py"), "--runner", runner]
    began = time.monotonic()
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"the build in {dataset} ended with {ended.returncode}: {ended.stderr[-2000:]}")
    return time.monotonic() - began


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200, help="of the source")
    parser.add_argument("--every", type=int, default=10, help="of so many requests one is struck")
    parser.add_argument("--slow", type=float, default=2.0, help="seconds that a slow request takes")
    parser.add_argument("--runner", choices=("ray", "local"), default="ray", help="of the builds")
    given = parser.parse_args()
    source = ShapesSource(count=given.rows, slow=0.0)
    struck: Counter[str] = Counter()
    found: dict[str, dict[str, Any]] = {}
    whole: dict[str, str] = {}
    with (
        tempfile.TemporaryDirectory() as name,
        serve(source) as url,
        unreliable_store(given.every, given.slow, struck) as (through, past),
    ):
        folder = Path(name)
        write_source(source, url, folder / "source.parquet")
        os.environ.update(past)
        for place, dataset, variables in (
            ("disk", str(folder / "dataset"), past),
            ("store", "s3://data/steady", past),
            ("store with bad moments", "s3://data/unreliable", through),
        ):
            seconds = build(folder, dataset, given.runner, variables)
            made = digests(Folder(url=dataset))
            whole = whole or made
            differing = sum(made.get(file) != whole.get(file) for file in {*made, *whole})
            found[place] = {"seconds": round(seconds, 1), "files": len(made), "differing": differing}
    found["store with bad moments"]["requests"] = dict(sorted(struck.items()))
    for place, told in found.items():
        print(f"{place:<24} | " + " | ".join(f"{name} {value}" for name, value in told.items()))
    print(json.dumps({"rows": given.rows, "every": given.every, "runner": given.runner, **found}))
    raise SystemExit(1 if any(told["differing"] for told in found.values()) else 0)


if __name__ == "__main__":
    main()
