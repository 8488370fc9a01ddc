"""a column of all partitions → the value above which the best share of it lies. What is to be done about it, others decide."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import ROUND_FLOOR, Context

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.sample import LISTED
from pipeline.stage import Columns, Stage


@dataclass(frozen=True, kw_only=True)
class PercentileConfig:
    """Which share of the dataset lies at the cut or above."""

    column: str = "clip_score"
    """Column of numbers."""
    keep: float = 0.7
    """Share of the rows, from 0 to 1. DataComp kept the best 0.3 by CLIP score."""

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"percentile of {self.column}: keep must be above 0 and at most 1, got {self.keep}")


class Percentile(Stage):
    """Reads a column and whether the source lists the sample; writes `<column>_cut`, the same number in each row.

    Of the n rows that are listed and have a number, the ceil(keep · n) largest, as 32-bit numbers, are at the cut or above,
    and those that equal it. It is rounded down to four digits, which scores have: a cut that stays leaves the tables as they
    are, and nothing after it is redone. Null where there is no number at all. Memory: four bytes a row of the dataset.
    """

    version = 2
    whole = True
    drops = False
    config: PercentileConfig

    def __init__(self, config: PercentileConfig) -> None:
        super().__init__(config)
        self.name = f"percentile_{config.column}"
        self.reads = (config.column, LISTED)
        self.writes = pa.schema([(f"{config.column}_cut", pa.float32())])
        self._cut: float | None = None

    def survey(self, batches: Iterator[pa.Table]) -> None:
        """Finds the cut."""
        parts = [_numbers(batch.filter(batch.column(LISTED)).column(self.config.column)) for batch in batches]
        values = np.concatenate([np.zeros(0, np.float32), *parts])
        self._cut = None
        if len(values):
            below = len(values) - math.ceil(round(self.config.keep * len(values), 6))  # 0.7 · 10 is 7, not 7.000000001
            values.partition(below)
            self._cut = _rounded_down(values[below])

    def process(self, batch: pa.Table) -> Columns:
        """Says the cut in each row."""
        return {self.writes.names[0]: [self._cut] * batch.num_rows}


def _rounded_down(value: np.float32) -> float:
    """To four significant digits of the shortest decimal that stands for the number, and so never above it."""
    return float(Context(prec=4, rounding=ROUND_FLOOR).create_decimal(str(value)))


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """Its values that are numbers, float32."""
    values = pc.drop_null(column).to_numpy().astype(np.float32)
    return values[~np.isnan(values)]
