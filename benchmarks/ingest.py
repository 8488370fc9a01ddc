"""Speed and memory of the ingest: `python -m benchmarks.ingest --rows 10000000 --existing 10000000`.

Ingests a first list of `--existing` rows, then a second list of `--rows` further ones beside a tenth of the first again,
each in a process of its own; and the same at a tenth of the size, to show the growth. Prints a table of rows, seconds,
rows a second and peak memory and, last, one line of JSON. Needs about 200 bytes of disk a row in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

BLOCK = 50_000  # rows; small, because a child's peak counts from its parent's


def write_list(path: Path, spans: list[tuple[int, int]]) -> None:
    """A parquet list of the URLs of these numbers, with texts of a usual length and two further columns."""
    schema = pa.schema(
        [("url", pa.string()), ("text", pa.string()), ("width", pa.int32()), ("aesthetic", pa.float32())]
    )
    with pq.ParquetWriter(path, schema) as writer:
        for first, last in spans:
            for start in range(first, last, BLOCK):
                numbers = np.arange(start, min(start + BLOCK, last))
                mixed = numbers * 2654435761 % 2**32  # so that they compress as little as real ones
                urls = [f"https://host{m % 5000}.example/pictures/{m:08x}/{n}.jpg" for n, m in zip(numbers, mixed)]
                texts = [
                    f"a picture of {m % 977} things beside {m % 7919} others, number {n}"
                    for n, m in zip(numbers, mixed)
                ]
                columns = [urls, texts, (mixed % 4096).astype(np.int32), (mixed % 1000 / 100).astype(np.float32)]
                writer.write_table(pa.table(columns, schema=schema))


def measure(job: str, dataset: Path, source: Path) -> dict[str, float]:
    """Runs one ingest (or preview) in a process of its own: partitions, seconds, peak GiB."""
    command = [sys.executable, "-m", "benchmarks.ingest", "--child", job, str(dataset), str(source)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(out.splitlines()[-1])


def child(job: str, dataset: str, source: str) -> None:
    """What `measure` runs."""
    from pipeline.storage import Folder
    from stages.ingest import ingest, preview
    from stages.source import Source

    started = time.perf_counter()
    work = {"ingest": ingest, "preview": preview}[job]
    partitions = work(Folder(url=dataset), Source(path=source))
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
    print(json.dumps({"partitions": len(partitions), "seconds": round(seconds, 2), "peak_gib": round(peak, 2)}))


def compare(rows: int, existing: int) -> dict[str, dict[str, float]]:
    """All measurements at one size: first list, second list, and the second once more, unchanged."""
    with tempfile.TemporaryDirectory(prefix="densebridge-benchmark-") as folder:
        dataset, first, second = (Path(folder) / name for name in ("dataset", "first.parquet", "second.parquet"))
        write_list(first, [(0, existing)])
        write_list(second, [(existing - existing // 10, existing), (existing, existing + rows)])
        found = {"first": measure("ingest", dataset, first)}
        found["second"] = measure("ingest", dataset, second)
        found["again"] = measure("ingest", dataset, second)
    for name, count in (("first", existing), ("second", rows + existing // 10)):
        found[name] |= {"rows": count, "rows_per_second": round(count / found[name]["seconds"])}
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000, help="new rows of the second list")
    parser.add_argument("--existing", type=int, default=10_000_000, help="rows of the first list")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        return child(*given.child)
    sizes = [(given.rows // 10, given.existing // 10), (given.rows, given.existing)]
    told = []
    print(f"{'rows':>12} {'existing':>12} {'list':>7} {'seconds':>9} {'rows/s':>9} {'peak GiB':>9}")
    for rows, existing in sizes:
        found = compare(rows, existing)
        told.append({"rows": rows, "existing": existing, **found})
        for name, row in found.items():
            speed = f"{row['rows_per_second']:,}" if "rows_per_second" in row else ""
            print(
                f"{rows:>12,} {existing:>12,} {name:>7} {row['seconds']:>9} {speed:>9} {row['peak_gib']:>9}", flush=True
            )
    print(json.dumps({"benchmark": "ingest", "sizes": told}))


if __name__ == "__main__":
    main()
