"""Keyed shuffles with no history: any place of them can be computed by itself."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

ROUNDS = 6


def permuted(positions: np.ndarray, size: int, key: bytes) -> np.ndarray:
    """A keyed permutation of range(size), at `positions`, with no table: int64 (n,) -> int64 (n,).

    A balanced Feistel network over the smallest even power of two that holds `size`; what falls outside walks on along
    its cycle until it falls inside (Black & Rogaway 2002, cycle walking).
    """
    half = max(1, ((max(size, 2) - 1).bit_length() + 1) // 2)
    low = np.uint64((1 << half) - 1)
    keys = _words(key, ROUNDS)
    out = np.asarray(positions, dtype=np.uint64).copy()
    walking = np.ones(out.shape, dtype=bool)
    while walking.any():
        left, right = out[walking] >> np.uint64(half), out[walking] & low
        for round_key in keys:
            left, right = right, left ^ (_mixed(right ^ round_key) & low)
        out[walking] = (left << np.uint64(half)) | right
        walking &= out >= size
    return out.astype(np.int64)


def interleaved(counts: Sequence[int], key: bytes) -> tuple[np.ndarray, np.ndarray]:
    """In which order streams that have so many turns each take them: whose it is, and which of its own, int64 (sum,) both.

    The k-th turn of a stream with n falls somewhere in the k-th of n equal parts of the whole; where, is drawn by the key.
    So turns look random, and every stretch holds nearly its share of each.
    """
    sizes = np.asarray(counts, dtype=np.int64)
    streams = np.repeat(np.arange(len(sizes)), sizes)
    turns = np.arange(len(streams)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    drawn = _mixed(np.arange(len(streams), dtype=np.uint64) ^ _words(key, 1)) >> np.uint64(11)
    times = (turns + drawn * 2.0**-53) / sizes[streams]
    order = np.argsort(times, kind="stable")
    return streams[order], turns[order]


def _words(key: bytes, count: int) -> np.ndarray:
    return np.frombuffer(hashlib.blake2b(key, digest_size=8 * count).digest(), dtype="<u8").astype(np.uint64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
