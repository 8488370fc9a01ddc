"""The cut above which a share of the whole dataset lies."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.clip_filter import ClipFilter, ClipFilterConfig
from stages.percentile import Percentile, PercentileConfig


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


@pytest.mark.parametrize("keep", [0.0, 1.1, -1.0])
def test_a_share_is_from_0_to_1(keep: float) -> None:
    with pytest.raises(ValueError, match="keep must be above 0 and at most 1"):
        PercentileConfig(keep=keep)
