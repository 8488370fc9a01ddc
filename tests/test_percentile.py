"""The cut above which a share of the whole dataset lies."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.plan import make_plan
from pipeline.runner import run_plan
from pipeline.stage import Columns, Stage
from pipeline.storage import Folder
from pipeline.tables import read_table
from stages.clip_filter import ClipFilter, ClipFilterConfig
from stages.ingest import ingest
from stages.percentile import Percentile, PercentileConfig
from tests.small_stages import Small, SmallConfig, small_source


def cut_of(values: list[float | None], keep: float, listed: list[bool] | None = None, size: int = 3) -> float | None:
    table = pa.table({"clip_score": pa.array(values, pa.float32()), "listed": listed or [True] * len(values)})
    stage = Percentile(PercentileConfig(keep=keep))
    stage.survey(table.slice(start, size) for start in range(0, max(len(values), 1), size))
    found = stage.process(table.slice(0, 2))["clip_score_cut"]
    assert len(found) == min(2, len(values)) and len(set(found)) <= 1
    return found[0] if found else None


def test_the_cut_is_the_least_of_those_kept() -> None:
    values = [0.1 * n for n in range(1, 11)]
    assert [cut_of(values, keep) for keep in (0.1, 0.3, 0.7, 0.71, 1.0)] == [1.0, 0.8, 0.4, 0.3, 0.1]


def test_only_numbers_of_listed_rows_count() -> None:
    assert cut_of([0.1, None, float("nan"), 0.5, 0.9], 0.5, [True, True, True, True, False]) == 0.5
    assert cut_of([0.1, 0.2], 0.5, [False, False]) is None and cut_of([None], 0.5) is None


scores = st.lists(st.integers(-10_000, 10_000).map(lambda n: n / 10_000), min_size=1, max_size=40)


@given(scores, st.floats(0.01, 1.0), st.randoms())
def test_the_share_passes_whatever_the_order(values: list[float], keep: float, order: object) -> None:
    cut = cut_of(values, keep)
    assert cut is not None and cut == cut_of(sorted(values), keep, size=7)
    held = np.array(values, np.float32) >= np.float32(cut)
    assert held.sum() >= math.ceil(round(keep * len(values), 6))
    assert (np.array(values, np.float32) > np.float32(cut)).sum() < max(math.ceil(round(keep * len(values), 6)), 1)


@given(st.lists(st.floats(1e-300, 1e30) | st.floats(-1e30, 0) | st.floats(0, 1e-5), min_size=1), st.floats(0.01, 1.0))
def test_the_filter_passes_the_share_of_numbers_of_any_size(values: list[float], keep: float) -> None:
    """Columns of 64-bit numbers too; beyond four digits the cut may let a few more through."""
    stage = Percentile(PercentileConfig(column="odds", keep=keep))
    count = len(values)
    table = pa.table({"odds": pa.array(values, pa.float64()), "listed": [True] * count})
    stage.survey(iter([table]))
    cuts = pa.array(stage.process(table)["odds_cut"], pa.float32())
    scored = {"clip_score": pa.array([0.5] * count, pa.float32()), "sentence_scores": [[0.5]] * count}
    alts = pa.array([None] * count, pa.float32())
    sieve = ClipFilter(ClipFilterConfig(cuts=("odds",)))
    reasons = sieve.process(pa.table({**scored, "alt_score": alts, "odds": table["odds"], "odds_cut": cuts}))["reason"]
    best = sorted(values, reverse=True)[: math.ceil(round(keep * count, 6))]
    assert all(reason is None for reason, value in zip(reasons, values) if value >= best[-1])
    least = np.float32(best[-1]) - 1.1e-3 * abs(np.float32(best[-1])) - 1e-44
    assert all(reason for reason, value in zip(reasons, values) if np.float32(value) < least)


def test_tiny_probabilities_are_told_apart() -> None:
    assert cut_of([1.234567e-5, 2e-5, 3e-6, 4e-7], 0.5) == 1.234e-5 and cut_of([-1.234567, -2.0], 0.5) == -1.235


def test_a_second_survey_starts_anew() -> None:
    stage = Percentile(PercentileConfig(keep=1.0))
    for value in (0.5, None):
        stage.survey(iter([pa.table({"clip_score": pa.array([value], pa.float32()), "listed": [True]})]))
        assert stage.process(pa.table({"key": ["a"]}))["clip_score_cut"] == [value]


def test_the_filter_holds_rows_against_the_cut() -> None:
    stage = Percentile(PercentileConfig(column="aesthetic_score"))
    assert (stage.name, stage.reads, stage.whole) == (
        "percentile_aesthetic_score", ("aesthetic_score", "listed"), True
    )  # fmt: skip
    table = pa.table(
        {
            "key": list("abcd"),
            "clip_score": pa.array([0.5] * 4, pa.float32()),
            "sentence_scores": [[0.5]] * 4,
            "alt_score": pa.array([None] * 4, pa.float32()),
            "aesthetic_score": pa.array([6.5, 6.0, 5.9, None], pa.float32()),
            "aesthetic_score_cut": pa.array([6.0] * 4, pa.float32()),
        }
    )
    sieve = ClipFilter(ClipFilterConfig(cuts=("aesthetic_score",)))
    assert sieve.reads[-2:] == ("aesthetic_score", "aesthetic_score_cut")
    assert sieve.process(table)["reason"] == [None, None, "below_percentile", "below_percentile"]


class Scores(Small):
    """The number in the url → clip_score, and what the filter reads besides."""

    name = "scores"
    reads = ("url",)
    writes = pa.schema(
        [("clip_score", pa.float32()), ("sentence_scores", pa.list_(pa.float32())), ("alt_score", pa.float32())]
    )

    def process(self, batch: pa.Table) -> Columns:
        found = [float(url.split("/")[2]) for url in batch.column("url").to_pylist()]
        return {"clip_score": found, "sentence_scores": [[s] for s in found], "alt_score": [None] * len(found)}


def build(folder: Path, scores: list[float]) -> tuple[list[float], dict[str, set[str]]]:
    """Builds the dataset of these scores; the scores kept, and the tables of each stage."""
    dataset = Folder(url=str(folder / "dataset"))
    sieve = ClipFilter(ClipFilterConfig(cuts=("clip_score",)))
    stages: list[Stage] = [Scores(SmallConfig()), Percentile(PercentileConfig(keep=0.5)), sieve]
    partitions = ingest(dataset, small_source(folder, [f"u://{score}" for score in scores]))
    while not (plan := make_plan(dataset, stages, partitions)).is_empty:
        run_plan(dataset, stages, plan, lambda _: None, runner="local")
    named = {s.name: {t.tables[s.name].parquet for t in plan.tickets} for s in stages}
    rows = [read_table(dataset, t.tables[s.name]).sort_by("key") for t in plan.tickets for s in (stages[0], sieve)]
    pairs = zip(pa.concat_tables(rows[::2]).to_pylist(), pa.concat_tables(rows[1::2]).to_pylist())
    return sorted(round(a["clip_score"], 4) for a, b in pairs if b["status"] == "kept"), named


def test_a_cut_that_stays_redoes_no_filter(tmp_path: Path) -> None:
    values = [n / 100 for n in range(20)]
    kept, first = build(tmp_path, values)
    assert kept == values[10:]
    kept, more = build(tmp_path, [*values, 0.001, 0.999])  # one below the cut, one above
    assert kept == [*values[10:], 0.999]
    assert first["clip_filter"] < more["clip_filter"]
    kept, _ = build(tmp_path, [*values, 0.001, 0.999, 0.5, 0.6])
    assert kept == [*values[11:], 0.5, 0.6, 0.999]
    kept, _ = build(tmp_path, values[:-4])  # what is no longer listed does not count, and may stay or go
    assert [v for v in kept if v in values[:-4]] == values[8:-4]


@pytest.mark.parametrize("keep", [0.0, 1.1, -1.0])
def test_a_share_is_from_0_to_1(keep: float) -> None:
    with pytest.raises(ValueError, match="keep must be above 0 and at most 1"):
        PercentileConfig(keep=keep)
