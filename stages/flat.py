"""Columns as flat arrays: bytes of one width, hexadecimal names, and rows that are appended to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_NO_DIGIT = 16
_VALUES = np.full(256, _NO_DIGIT, np.uint8)
_VALUES[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16)
_VALUES[np.frombuffer(b"ABCDEF", np.uint8)] = np.arange(10, 16)


class Flat:
    """Rows of one width in one array, which grows by a quarter; what it has room for but not yet holds takes no memory."""

    def __init__(self, dtype: Any, width: int) -> None:
        self._room, self._count = np.empty((1024, width), dtype), 0

    def extend(self, rows: np.ndarray) -> None:
        """Appends rows (count, width)."""
        count = self._count + len(rows)
        if count > len(self._room):
            room = np.empty((max(count, len(self._room) * 5 // 4), self._room.shape[1]), self._room.dtype)
            room[: self._count] = self.rows
            self._room = room
        self._room[self._count : count] = rows
        self._count = count

    @property
    def rows(self) -> np.ndarray:
        """All rows; writing into it changes them."""
        return self._room[: self._count]


def fixed_bytes(column: pa.ChunkedArray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 (rows, width), bool (rows,): where the value is of that width) of a column of bytes or strings; zeros else."""
    column = column.cast(pa.binary())
    fits = pc.fill_null(pc.equal(pc.binary_length(column), width), False)
    whole = pc.if_else(fits, column, pa.scalar(bytes(width))).combine_chunks()
    if not len(whole):
        return np.empty((0, width), np.uint8), np.empty(0, bool)
    starts = np.frombuffer(whole.buffers()[1], np.int32)
    values = np.frombuffer(whole.buffers()[2], np.uint8)[starts[whole.offset] :]
    return values[: len(whole) * width].reshape(-1, width), fits.to_numpy()


def from_hex(column: pa.ChunkedArray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 (rows, width), bool (rows,): where the value is `width` bytes in hexadecimal) of a column of strings."""
    digits, fits = fixed_bytes(column, 2 * width)
    values = _VALUES[digits]
    fits = fits & (values < _NO_DIGIT).all(axis=1)
    return values[:, ::2] << 4 | values[:, 1::2] & 15, fits


def to_hex(rows: np.ndarray) -> list[str]:
    """Rows of bytes as strings."""
    text, width = np.ascontiguousarray(rows).tobytes().hex(), 2 * rows.shape[1]
    return [text[start : start + width] for start in range(0, len(text), width)]
