"""The statistics of a comparison, against the closed form of the normal distribution."""

from __future__ import annotations

import numpy as np
import pytest

from training.evaluation.compare import interval, paired


def test_interval_is_that_of_the_mean() -> None:
    values = np.random.default_rng(0).normal(3, 2, size=400)
    found = interval(values)
    half = 1.96 * values.std() / 20
    assert found.mean == pytest.approx(values.mean()) and found.count == 400
    assert found.low == pytest.approx(values.mean() - half, abs=0.02)
    assert found.high == pytest.approx(values.mean() + half, abs=0.02)
    assert interval(values) == found and interval(values, seed=1) != found


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    held = [
        found.low <= 0 <= found.high for found in (interval(rng.normal(size=100), resamples=500) for _ in range(200))
    ]
    assert 0.88 <= np.mean(held) <= 0.99


def test_pairing_sees_what_separate_intervals_hide() -> None:
    rng = np.random.default_rng(2)
    difficulty = rng.normal(0, 5, size=200)
    a, b = difficulty + rng.normal(0.3, 0.5, size=200), difficulty + rng.normal(0, 0.5, size=200)
    assert interval(a).low < interval(b).high
    assert paired(a, b).low > 0 and paired(b, b).low == paired(b, b).high == 0
    assert paired(a, b).mean == pytest.approx(-paired(b, a).mean)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="score 1 is not finite"):
        interval(np.array([0.0, np.nan]))
    with pytest.raises(ValueError, match=r"arms have shapes \(2,\) and \(3,\)"):
        paired(np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match="at least one"):
        interval(np.array([]))
