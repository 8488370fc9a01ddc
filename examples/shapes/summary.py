"""The demo's numbers: what the build did to the world, held against the truth that only the world knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from rich.table import Table

from jobs.display import console, print_funnel
from jobs.evaluate import print_scores
from pipeline.funnel import FunnelRow, count_funnel
from pipeline.plan import Plan, make_plan
from pipeline.tables import read_parquet, read_table
from stages.ingest import ingested

from .making.measure import auc_of
from .oracle import fact_f1, read_caption
from .recipe import recipe
from .source import Row, ShapesSource, truth


def summarise(source: ShapesSource, seconds: dict[str, float], peak_memory_gb: float) -> dict[str, Any]:
    """The content of `summary.json`."""
    dataset = recipe.folder
    plan = make_plan(dataset, recipe.stages, ingested(dataset, recipe.source))
    funnel = count_funnel(dataset, recipe.stages, plan.tickets)
    rows = _rows_by_key(source, plan)
    evaluation = json.loads((Path(recipe.runs) / "evaluation" / "evaluation.json").read_text())
    return {
        "seconds": seconds,
        "peak_memory_gb": round(peak_memory_gb, 2),
        "funnel": {name: row.as_json() for name, row in funnel.items()},
        "caption_fact_f1": _caption_f1(plan, rows),
        "clip_auc": _clip_auc(plan, rows),
        **_mismatches(plan, rows),
        "oracle": {
            arm: {"n": row["n"], **{m: row[m] for m in ("fact", "full", "bag", "count")}}
            for arm, row in evaluation["oracle"].items()
        },
        "gain": {
            pair: {m: measures[m] for m in ("fact", "full", "bag")} for pair, measures in evaluation["gain"].items()
        },
    }


def _rows_by_key(source: ShapesSource, plan: Plan) -> dict[str, Row]:
    """The truth of every sample."""
    known = truth(source)
    found = {}
    for ticket in plan.tickets:
        table = read_parquet(recipe.folder, ticket.partition.parquet, ["key", "url"])
        for key, url in zip(table.column("key").to_pylist(), table.column("url").to_pylist(), strict=True):
            found[key] = known[urlsplit(url).path]
    return found


def _columns(plan: Plan, stage: str, *names: str) -> list[list[Any]]:
    """Columns of a stage's kept rows, over all partitions."""
    found: list[list[Any]] = [[] for _ in names]
    for ticket in plan.tickets:
        table = read_table(recipe.folder, ticket.tables[stage], ["status", *names])
        kept = [s == "kept" for s in table.column("status").to_pylist()]
        for values, name in zip(found, names, strict=True):
            values += [v for v, k in zip(table.column(name).to_pylist(), kept, strict=True) if k]
    return found


def _caption_f1(plan: Plan, rows: dict[str, Row]) -> float:
    """F1 of all facts that the captions claim, over the pictures of this world."""
    keys, captions = _columns(plan, "recaption", "key", "caption")
    pairs = [(read_caption(c), rows[k].facts) for k, c in zip(keys, captions, strict=True)]
    known = [(claimed, facts) for claimed, facts in pairs if facts is not None]
    return round(fact_f1([c for c, _ in known], [f for _, f in known])["all"]["f1"], 4)


def _clip_auc(plan: Plan, rows: dict[str, Row], most: int = 1500) -> float:
    """AUC of matched against random pairs of picture and dense caption, from the stored embeddings."""
    images = dict(zip(*_columns(plan, "embed", "key", "image_embedding"), strict=True))
    texts = dict(zip(*_columns(plan, "score", "key", "caption_embedding"), strict=True))
    known = [key for key in texts if rows[key].facts is not None][:most]
    return auc_of(np.array([images[k] for k in known]) @ np.array([texts[k] for k in known]).T)["auc"]


def _mismatches(plan: Plan, rows: dict[str, Row]) -> dict[str, float]:
    """How well `alt_supported = false` finds the alt texts that were planted from other pictures.

    Vague alt texts that CLIP does not see supported count as false alarms.
    """
    keys, supported = _columns(plan, "clip_filter", "key", "alt_supported")
    judged = [(s is False, rows[k].planted_mismatch) for k, s in zip(keys, supported, strict=True) if rows[k].facts]
    hits = sum(flagged and planted for flagged, planted in judged)
    return {
        "mismatch_precision": round(hits / max(sum(f for f, _ in judged), 1), 4),
        "mismatch_recall": round(hits / max(sum(p for _, p in judged), 1), 4),
    }


def print_summary(summary: dict[str, Any]) -> None:
    """The tables at the demo's end."""
    funnel = {
        name: FunnelRow(given=row["in"], kept=row["kept"], dropped=row["dropped"], failed=row["failed"])
        for name, row in summary["funnel"].items()
    }
    print_funnel(funnel)
    print_scores(summary["oracle"])
    table = Table(
        "gain", "fact", "full", "bag", title="paired differences of the corrected measures", title_justify="left"
    )
    for pair, measures in summary["gain"].items():
        cells = [f"{v['mean']:+.3f} [{v['interval'][0]:+.3f}, {v['interval'][1]:+.3f}]" for v in measures.values()]
        table.add_row(pair.replace("_", " "), *cells)
    console.print(table)
    names = ("caption_fact_f1", "clip_auc", "mismatch_precision", "mismatch_recall", "peak_memory_gb", "seconds")
    for name in names:
        console.print(f"{name}: {summary[name]}")
