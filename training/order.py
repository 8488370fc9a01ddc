"""In which order a phase goes through its view: a pure function of (seed, phase, manifest, position), with no table."""

from __future__ import annotations

import hashlib

import numpy as np

ROUNDS = 6


def permuted(positions: np.ndarray, size: int, key: bytes) -> np.ndarray:
    """A keyed permutation of range(size), at `positions`, with no table: int64 (n,) -> int64 (n,).

    A balanced Feistel network over the smallest even power of two that holds `size`; what falls outside walks on along
    its cycle until it falls inside (Black & Rogaway 2002, cycle walking).
    """
    half = max(1, ((max(size, 2) - 1).bit_length() + 1) // 2)
    low = np.uint64((1 << half) - 1)
    keys = np.frombuffer(hashlib.blake2b(key, digest_size=8 * ROUNDS).digest(), dtype="<u8").astype(np.uint64)
    out = np.asarray(positions, dtype=np.uint64).copy()
    walking = np.ones(out.shape, dtype=bool)
    while walking.any():
        left, right = out[walking] >> np.uint64(half), out[walking] & low
        for round_key in keys:
            left, right = right, left ^ (_mixed(right ^ round_key) & low)
        out[walking] = (left << np.uint64(half)) | right
        walking &= out >= size
    return out.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def rows_at(seed: int, phase: int, manifest: str, positions: np.ndarray, size: int) -> np.ndarray:
    """Manifest rows of positions: int64 (n,) -> int64 (n,). Every row comes once in each epoch of `size` positions."""
    positions = np.asarray(positions, dtype=np.int64)
    epochs = positions // size
    rows = np.empty_like(positions)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        rows[here] = permuted(positions[here] % size, size, f"{seed}/{phase}/{manifest}/{epoch}".encode())
    return rows
