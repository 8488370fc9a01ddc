"""What each kind of change costs, beside img2dataset and Ray Data's checkpoints: `python -m benchmarks.changes --rows 600`.

Builds the shapes world once, makes every change to a copy of it, takes it back, and holds both against builds from
nothing; then has the peers do the same changes as far as they know them. About ten minutes on two cores. Prints two
Markdown tables and, last, one line of JSON. Everything is in a temporary folder that is removed.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from jobs.cli import one_line
from jobs.recipe import quiet_libraries

from .changing_world import Cost, Measured, Tally, changing_world
from .peers import img2dataset, ray_data
from .rebuilds import CHANGES, Outcome, Rebuild, Rebuilds

LABELS = {
    "nothing": "nothing",
    "added": "10 % new rows, list shuffled",
    "removed": "10 % of the rows gone",
    "reordered": "list reversed, 10 % listed twice",
    "prompt": "caption prompts",
    "threshold": "CLIP threshold",
    "where": "a view's condition",
    "tokens": "token length",
    "resolution": "a view's resolution",
    "stored_size": "size of the stored pictures",
    "limit": "smallest picture that is kept",
    "refresh": "every server asked again",
    "version": "caption code, same captions",
    "batch": "batch size, threads, runner",
    "retry": "failed rows tried again",
}
Peers = Mapping[str, Mapping[str, Cost]]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=600, help="rows of the first list")
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    quiet_libraries()
    began = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder:
            full, ours, peers = measure_all(given.rows, Path(folder))
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"changes: {one_line(error)}") from None
    print("\n" + compared(full, ours, peers))
    print("\n" + by_stage(full, ours))
    found = {
        "rows": given.rows,
        "seconds": round(time.perf_counter() - began, 1),
        "versions": {name: version(name) for name in ("densebridge", "img2dataset", "ray")},
        "first": asdict(full),
        "densebridge": {name: asdict(outcome) for name, outcome in ours.items()},
        **{tool: {name: asdict(cost) for name, cost in costs.items()} for tool, costs in peers.items()},
    }
    print("\n" + json.dumps(found))


def measure_all(rows: int, folder: Path) -> tuple[Rebuild, dict[str, Outcome], Peers]:
    """Our first build, our changes, and the peers'. A server for each, as it remembers what it was asked."""
    ours = {}
    with changing_world(rows) as world:
        rebuilds = Rebuilds(world, folder / "densebridge")
        for name, change in CHANGES.items():
            ours[name] = rebuilds.outcome(name, change)
            print(f"densebridge, {name}: {ours[name].there.wrong}", flush=True)
    peers = {}
    with changing_world(rows) as world:
        peers[f"img2dataset {version('img2dataset')}"] = img2dataset(world, folder / "img2dataset")
        for kind, keep in (("checkpoint kept", True), ("default", False)):
            peers[f"Ray Data {version('ray')}, {kind}"] = ray_data(world, folder / f"ray-{kind}", keep=keep)
    return rebuilds.full, ours, peers


def compared(full: Rebuild, ours: Mapping[str, Outcome], peers: Peers) -> str:
    """What is asked for, captioned and wrong: a row a change."""
    work = [f"{tool}: {'asked' if tool.startswith('img2dataset') else 'captioned'}" for tool in peers]
    head = ["change", "densebridge: asked", "captioned", "cost", "wrong", *(c for w in work for c in (w, "wrong"))]
    rows = [
        ["*first build*", *_ours(full, full), *(c for costs in peers.values() for c in _peer(costs["first"].there))]
    ]
    for name, outcome in ours.items():
        found = [costs[name].there if name in costs else None for costs in peers.values()]
        rows.append([LABELS[name], *_ours(outcome.there, full), *(c for one in found for c in _peer(one))])
    back = max((o.back for o in ours.values()), key=lambda b: (b.wrong.worst, b.seconds, b.requests))
    worst = [max((c.back for c in costs.values() if c.back), key=_harm) for costs in peers.values()]
    rows.append(["*any of them taken back (worst)*", *_ours(back, full), *(c for one in worst for c in _peer(one))])
    return markdown(head, rows)


def by_stage(full: Rebuild, ours: Mapping[str, Outcome]) -> str:
    """Rows that each of our stages was given, and whether all was as promised: a row a change."""
    rows = [["*first build*", *map(str, full.rows.values()), ""]]
    for name, outcome in ours.items():
        given = [str(outcome.there.rows.get(stage, 0)) for stage in full.rows]
        rows.append([LABELS[name], *given, "yes" if outcome.as_promised else "**no**"])
    return markdown(["change", *full.rows, "as promised"], rows)


def _ours(done: Rebuild, full: Rebuild) -> list[str]:
    cost = f"{done.seconds / full.seconds:.1%}"
    return [_counted(done.requests, done.again), str(done.rows.get("recaption", 0)), cost, _told(done.wrong)]


def _peer(measured: Measured | None) -> list[str]:
    if measured is None:
        return ["–", "–"]
    return [_counted(measured.work, measured.again), _told(measured.wrong)]


def _counted(work: int, again: int) -> str:
    return f"{work} ({again} again)" if again else str(work)


def _told(wrong: Tally) -> str:
    return f"**{wrong}**" if wrong.worst else "0"


def _harm(measured: Measured) -> tuple[int, int]:
    return measured.wrong.worst, measured.work


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with columns wide enough to be read as it is."""
    widths = [max(len(row[spot]) for row in (head, *rows)) for spot in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(f"| {' | '.join(c.ljust(w) for c, w in zip(line, widths, strict=True))} |" for line in lines)


if __name__ == "__main__":
    main()
