"""What a position costs in each order of samples: `python -m benchmarks.order [--rows 34000000]`.

Whole shuffle, windows of 32 shards, 40 buckets, both, and two views mixed: seconds to lay it out, milliseconds of the first call
at a far position, microseconds a position in runs of a batch, and of asking which shards come next; all by the processor's
time. No data is read. Prints a table and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable

import numpy as np

from training.order import Bucketed, Mixed, Order, Whole, Windowed

BATCH, BUCKETS, WINDOW, ROWS_A_SHARD, CALLS = 256, 40, 32, 5000, 400
FAR = 3.3
"""Epochs before the positions that are asked for."""


def bucketed(counts: np.ndarray, names: list[tuple[str]], window: int) -> Bucketed:
    """As many buckets as SDXL has, of unequal sizes."""
    rng = np.random.default_rng(0)
    numbers = rng.choice(BUCKETS, int(counts.sum()), p=rng.dirichlet(np.full(BUCKETS, 2.0))).astype(np.int16)
    rows = np.argsort(numbers, kind="stable").astype(np.uint32)
    tables = np.split(rows, np.cumsum(np.bincount(numbers, minlength=BUCKETS))[:-1])
    edges = np.append(0, np.cumsum(counts))
    orders: list[Order] = [
        Windowed(np.diff(np.searchsorted(table, edges)), names, window, "key", str(number))
        if window
        else Whole(len(table), f"key/{number}")
        for number, table in enumerate(tables)
    ]
    return Bucketed(tables, orders, BATCH, "key")


def measure(make: Callable[[], Order], rows: int) -> dict[str, float]:
    """Of one order, by the processor's time."""
    far = int(rows * FAR) // BATCH * BATCH
    began = time.process_time()
    order = make()
    built = time.process_time()
    order.rows(np.arange(BATCH) + far)
    first = time.process_time()
    for call in range(1, CALLS + 1):
        order.rows(np.arange(BATCH) + far + call * BATCH)
    asked = time.process_time()
    for call in range(CALLS):
        order.shards_ahead(far + call * BATCH)
    ended = time.process_time()
    return {
        "built_s": built - began,
        "first_ms": 1e3 * (first - built),
        "position_us": 1e6 * (asked - first) / CALLS / BATCH,
        "shards_ahead_us": 1e6 * (ended - asked) / CALLS,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=34_000_000)
    rows = parser.parse_args().rows
    counts = np.full(rows // ROWS_A_SHARD, ROWS_A_SHARD)
    rows, names = int(counts.sum()), [(f"{number}.tar",) for number in range(len(counts))]
    orders: dict[str, Callable[[], Order]] = {
        "whole": lambda: Whole(rows, "key"),
        "windows": lambda: Windowed(counts, names, WINDOW, "key"),
        "buckets": lambda: bucketed(counts, names, 0),
        "buckets in windows": lambda: bucketed(counts, names, WINDOW),
        "two views mixed": lambda: Mixed([Whole(rows, "a"), Whole(rows // 3, "b")], [rows, rows // 3], [3, 1], "key"),
    }
    found = {}
    print(f"{'order':20}{'built s':>10}{'first ms':>10}{'us a position':>15}{'us shards ahead':>17}")
    for name, make in orders.items():
        found[name] = one = measure(make, rows)
        print(f"{name:20}" + f"{one['built_s']:10.2f}{one['first_ms']:10.1f}{one['position_us']:15.2f}", end="")
        print(f"{one['shards_ahead_us']:17.0f}", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"rows": rows, "shards": len(counts), "batch": BATCH, "peak_mib": round(peak), "orders": found}))


if __name__ == "__main__":
    main()
