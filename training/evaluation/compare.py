"""How sure a comparison is: means and paired differences over the same prompts, with bootstrap intervals (Efron 1979)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
_CHUNK = 500  # resamples at once, to bound memory


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float
    count: int
    """Prompts behind it."""


def interval(values: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Mean and percentile interval of per-prompt scores (n,). Raises ValueError for none, or for values not finite."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"scores have shape {values.shape}: give one number for each prompt, and at least one")
    if not np.isfinite(values).all():
        raise ValueError(
            f"score {int(np.flatnonzero(~np.isfinite(values))[0])} is not finite: leave that prompt out of all arms"
        )
    draw = np.random.default_rng(seed)
    means = np.empty(resamples)
    for first in range(0, resamples, _CHUNK):
        part = slice(first, min(first + _CHUNK, resamples))
        means[part] = values[draw.integers(len(values), size=(part.stop - first, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(mean=float(values.mean()), low=float(low), high=float(high), count=len(values))


def paired(a: np.ndarray, b: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Mean of a - b over the same prompts (n,) with its interval: prompts are resampled, arms stay together."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"arms have shapes {a.shape} and {b.shape}: score both on the same prompts, in one order")
    return interval(a - b, seed=seed, resamples=resamples)
