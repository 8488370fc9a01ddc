"""Columns as flat arrays: what fits, what does not, and rows that are appended to."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.flat import Flat, fixed_bytes, from_hex, to_hex


@settings(deadline=None)
@given(st.lists(st.none() | st.binary(max_size=5), max_size=9), st.integers(0, 9))
def test_only_values_of_the_width_are_taken(values: list[bytes | None], start: int) -> None:
    column = pa.chunked_array([pa.array([b"xyz", *values], pa.binary()).slice(1), pa.array([b"abc"], pa.binary())])
    column, values = column.slice(start), [*values, b"abc"][start:]
    rows, fits = fixed_bytes(column, 3)
    assert fits.tolist() == [v is not None and len(v) == 3 for v in values]
    assert [row.tobytes() for row in rows] == [v if v is not None and len(v) == 3 else bytes(3) for v in values]


def test_hexadecimal_digits_there_and_back() -> None:
    column = pa.chunked_array([["00ff", "A1b2", "00f", "00fg", "", None, "é00"]], pa.string())
    rows, fits = from_hex(column, 2)
    assert fits.tolist() == [True, True, False, False, False, False, False]
    assert to_hex(rows[:2]) == ["00ff", "a1b2"] and to_hex(rows[:0]) == []


@settings(deadline=None)
@given(st.lists(st.integers(0, 3000), max_size=6))
def test_rows_are_appended_in_their_order(counts: list[int]) -> None:
    flat, expected = Flat(np.uint16, 2), np.arange(2 * sum(counts), dtype=np.uint16).reshape(-1, 2)
    for start, count in zip(np.cumsum([0, *counts]), counts):
        flat.extend(expected[start : start + count])
    assert np.array_equal(flat.rows, expected)
