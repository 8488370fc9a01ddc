"""Shuffles that any place of can be asked for: each is one to one, and depends on its key alone."""

from __future__ import annotations

import hashlib
import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from training.permutation import interleaved, permuted


@settings(deadline=None)
@given(size=st.integers(1, 5000), key=st.binary(max_size=8))
def test_permuted_is_a_permutation(size: int, key: bytes) -> None:
    assert np.array_equal(np.sort(permuted(np.arange(size), size, key)), np.arange(size))


@settings(deadline=None)
@given(size=st.integers(2, 10**12), position=st.integers(0, 10**12))
def test_permuted_is_one_to_one_for_any_size(size: int, position: int) -> None:
    near = np.unique(np.array([position, position + 1, size - 1, 0]) % size)
    found = permuted(near, size, b"key")
    assert len(np.unique(found)) == len(near) and found.min() >= 0 and found.max() < size


def test_permuted_looks_random_and_depends_on_its_key() -> None:
    one, two = (permuted(np.arange(10_000), 10_000, key) for key in (b"1", b"2"))
    assert (one == two).sum() < 10
    assert abs(np.corrcoef(np.arange(10_000), one)[0, 1]) < 0.05
    assert abs(np.corrcoef(one[:-1], one[1:])[0, 1]) < 0.05


@settings(deadline=None)
@given(counts=st.lists(st.integers(0, 60), min_size=1, max_size=6), key=st.binary(max_size=8))
def test_every_stretch_of_turns_holds_its_share_of_each(counts: list[int], key: bytes) -> None:
    streams, turns = interleaved(counts, key)
    assert np.bincount(streams, minlength=len(counts)).tolist() == counts
    for stream, count in enumerate(counts):
        own = turns[streams == stream]
        assert np.array_equal(own, np.arange(count))  # each in its own sequence
        taken = np.cumsum(streams == stream)
        due = np.arange(1, len(streams) + 1) * count / max(1, len(streams))
        # Each stream is at most one turn ahead of its time or behind it, and time is what all together have taken.
        assert np.abs(taken - due).max(initial=0) <= math.fsum([1, *(min(1, n) for n in counts)])


def test_turns_look_random_and_stay_as_they_are() -> None:
    streams, _ = interleaved([300, 100], b"key")
    others, _ = interleaved([300, 100], b"another")
    assert (streams != others).any() and len(set(np.diff(np.flatnonzero(streams == 1)).tolist())) > 3
    assert hashlib.sha256(streams.astype("<i8").tobytes()).hexdigest().startswith("b1442feb9116290c")
