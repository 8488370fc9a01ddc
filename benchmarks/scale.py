"""What planning costs at the size of the real thing: 34 million rows, 6,800 partitions, every stage of ELLA's recipe.

    python -m benchmarks.scale [--partitions 680 6800] [--s3]

Lays down a dataset folder with the names that a build would have given (and next to nothing in the files), then runs
`densebridge plan` on it as anyone would, in a process of its own: with nothing to do, after 100,000 rows more, and with
another threshold. `--s3` does the same on an S3-compatible server on this machine (needs the extra `benchmarks`)
and counts the requests it gets by kind. Prints a table and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.recipe import Recipe, load_recipe
from pipeline.fingerprint import digest_of
from pipeline.partitions import Partition, partition_name
from pipeline.plan import Ticket, depends_on, input_id
from pipeline.settings import describe
from pipeline.tables import TableName
from stages.ingest import ingest

RECIPE = "ella_sd15"
SIZE = 5000
ROWS_MORE = 100_000
Write = Callable[[str, bytes], None]


def names_of(recipe: Recipe, partitions: list[Partition]) -> Iterator[str]:
    """The file names that a build of the partitions would have left, partition by partition."""
    needed = [depends_on(recipe.stages, i) for i in range(len(recipe.stages))]
    before = [""] * len(recipe.stages)
    for partition in partitions:
        ticket, kept = Ticket(partition=partition), partition.rows
        for index, stage in enumerate(recipe.stages):
            wanted = input_id(stage, needed[index], ticket, before[index])
            assert wanted
            before[index] = wanted if stage.ordered else ""
            rows, kept = kept, kept * 9 // 10 if stage.drops else kept
            table = TableName(
                folder=stage.folder,
                partition=partition.name,
                input_id=wanted,
                content_id=digest_of(wanted, "content"),
                rows=rows,
                kept=kept,
                transient=0,
            )
            ticket = ticket.with_table(stage, table)
            yield table.parquet
            if stage.payload:
                yield table.tar


def lay_down(recipe: Recipe, count: int, write: Write, more: int) -> None:
    """A built dataset of `count` partitions, and `more` that are ingested but not yet worked on."""
    ids = [digest_of(str(n)) for n in range(count + more)]
    partitions = [Partition(name=partition_name(n, i), rows=SIZE, content_id=i) for n, i in enumerate(ids)]
    for partition in partitions:
        write(partition.parquet, b"x")
    for stage in recipe.stages:
        write(f"{stage.folder}/settings.json", json.dumps(describe(stage)).encode())
    for name in names_of(recipe, partitions[:count]):
        write(name, b"x")
    # The source is not read again while its size and time are those on record.
    source = Path(recipe.source.path)
    pq.write_table(pa.table({"URL": ["http://example.org/1"], "TEXT": [""]}), source)
    with tempfile.TemporaryDirectory() as folder:
        small = replace(recipe, dataset=folder)
        ingest(small.folder, recipe.source)
        record = Path(folder) / "sources"
        for path in record.glob("*.json"):
            told = json.loads(path.read_text())
            if "partitions" in told:
                told["partitions"] = {p.name: "" for p in partitions}
            write(f"sources/{path.name}", json.dumps(told).encode())


def plan(dataset: str, source: str, *flags: str, environment: dict[str, str] | None = None) -> dict[str, float]:
    """Seconds and peak memory of one `densebridge plan` in a process of its own, and the partitions that it would do."""
    code = (
        "import resource, sys\n"
        "from jobs import plan\n"
        "plan.main(sys.argv[1:])\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(used.ru_maxrss, used.ru_utime + used.ru_stime)"
    )
    variables = {**os.environ, **(environment or {}), "DENSEBRIDGE_DATASET": dataset, "DENSEBRIDGE_SOURCE": source}
    began = time.perf_counter()
    command = [sys.executable, "-c", code, RECIPE, "--json", *flags]
    out = subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout.splitlines()
    told, (memory, processor) = json.loads(out[-2]), out[-1].split()
    return {
        "seconds": round(time.perf_counter() - began, 2),
        "cpu_seconds": round(float(processor), 2),
        "peak_mb": round(int(memory) / 1024),
        "tables": sum(stage["to_compute"] for stage in told.values()),
        "up_to_date": sum(stage["up_to_date"] for stage in told.values()),
    }


def measure(count: int) -> dict[str, dict[str, float]]:
    """The three plans on this machine's disk."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DENSEBRIDGE_DATASET"], os.environ["DENSEBRIDGE_SOURCE"] = (
            f"{folder}/dataset",
            f"{folder}/source.parquet",
        )
        recipe = load_recipe(RECIPE)
        made: set[str] = set()

        def write(name: str, data: bytes) -> None:
            path = f"{folder}/dataset/{name}"
            parent = path.rsplit("/", 1)[0]
            if parent not in made:
                os.makedirs(parent, exist_ok=True)
                made.add(parent)
            with open(path, "wb") as file:
                file.write(data)

        lay_down(recipe, count, write, 0)
        where = (recipe.dataset, recipe.source.path)
        found = {"nothing": plan(*where)}  # cold: the first of a process and of the folder's names
        found["nothing, again"] = plan(*where)
        found["threshold"] = plan(*where, "--clip-filter.min-score", "0.3")
        lay_down(recipe, count, write, ROWS_MORE // SIZE)
        found["100,000 rows more"] = plan(*where)
        return found


@contextmanager
def s3_server(asked: Counter[str], failing: Counter[str] | None = None) -> Iterator[tuple[str, Write]]:
    """An S3-compatible server on this machine with a bucket `data`; counts requests by kind. Yields its address and a way
    to put objects there without asking it. `failing`: how often a request (`GET /data/name`) is refused from now on.
    """
    from fsspec import get_filesystem_class
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from moto.s3.models import s3_backends
    from werkzeug.serving import make_server

    app = DomainDispatcherApplication(create_backend_app)

    def counting(environ: dict[str, Any], start: Any) -> Any:
        query = environ.get("QUERY_STRING", "")
        kind = "LIST" if "list-type" in query or "prefix=" in query else environ["REQUEST_METHOD"]
        asked[kind] += 1
        wanted = f"{kind} {environ['PATH_INFO']}"
        if failing and failing[wanted] > 0:
            failing[wanted] -= 1
            start("403 Forbidden", [("Content-Length", "0")])
            return [b""]
        return app(environ, start)

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request otherwise
    server = make_server("127.0.0.1", 0, counting, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    backend = s3_backends["123456789012"]["aws"]
    backend.create_bucket("data", "us-east-1")

    def write(name: str, data: bytes) -> None:
        backend.put_object("data", name, data)

    try:
        yield f"http://127.0.0.1:{server.server_port}", write
    finally:
        server.shutdown()
        backend.reset()  # moto keeps its buckets as long as the process lives, and fsspec what talks to this address
        get_filesystem_class("s3").clear_instance_cache()


def measure_s3(count: int) -> dict[str, dict[str, float]]:
    """The three plans against the server, with the requests that each made."""
    asked: Counter[str] = Counter()
    found = {}
    with tempfile.TemporaryDirectory() as folder, s3_server(asked) as (address, write):
        os.environ["DENSEBRIDGE_DATASET"], os.environ["DENSEBRIDGE_SOURCE"] = (
            "s3://data/ella",
            f"{folder}/source.parquet",
        )
        recipe = load_recipe(RECIPE)
        access = {"AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        more = 0
        for name, flags in (
            ("nothing", ()),
            ("threshold", ("--clip-filter.min-score", "0.3")),
            ("100,000 rows more", ()),
        ):
            more = ROWS_MORE // SIZE if "more" in name else 0
            if not flags:
                lay_down(recipe, count, lambda n, data: write(f"ella/{n}", data), more)
            asked.clear()
            found[name] = {
                **plan(recipe.dataset, recipe.source.path, *flags, environment=access),
                **{f"requests {kind}": number for kind, number in sorted(asked.items())},
            }
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--partitions", type=int, nargs="+", default=[680, 6800], help=f"of {SIZE} rows each")
    parser.add_argument("--s3", action="store_true", help="also against an S3-compatible server, the last size")
    given = parser.parse_args()
    results: dict[str, dict[str, dict[str, float]]] = {str(n): measure(n) for n in given.partitions}
    if given.s3:
        results[f"s3 {given.partitions[-1]}"] = measure_s3(given.partitions[-1])
    for size, plans in results.items():
        for name, told in plans.items():
            rest = ", ".join(f"{key} {value}" for key, value in told.items())
            print(f"{size:>10} partitions | {name:<18} | {rest}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
