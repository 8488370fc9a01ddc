"""The index of bit signatures: what it must find, how likely it finds the rest, and what crowding costs."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.near import Banding, Index, Signatures

SMALL = Banding(bands=4, bits=12)  # finds all below a distance of 8; 48 bits of 64


def signatures(words: np.ndarray) -> Signatures:
    return Signatures(words=words, valid=np.ones(len(words), bool))


def flipped(words: np.ndarray, rng: np.random.Generator, count: int) -> np.ndarray:
    """The signatures with `count` random bits of each changed."""
    bits = np.unpackbits(words.view(np.uint8), axis=1)
    for row in bits:
        row[rng.choice(len(row), count, replace=False)] ^= 1
    return np.packbits(bits, axis=1).view(np.uint64)


@given(st.lists(st.integers(0, 2**9 - 1), min_size=1, max_size=40), st.integers(0, 7), st.integers(0, 40))
@settings(deadline=None)
def test_it_finds_what_comparing_all_finds(values: list[int], near: int, split: int) -> None:
    """Nine bits spread over the signature, so that many are near."""
    spread = [sum((v >> bit & 1) << 7 * bit for bit in range(9)) for v in values]
    words = np.array(spread, np.uint64)[:, None]
    index = Index(words=1, near=near, banding=SMALL)
    index.add(signatures(words[:split]))
    index.add(signatures(words[split:]))
    distances = np.bitwise_count(words ^ words.T).astype(int)
    below = np.arange(len(values))[::-1].copy()
    numbers, far = index.nearest(signatures(words), below)
    for spot, limit in enumerate(below):
        seen = distances[spot, :limit]
        best = int(np.argmin(seen)) if limit else -1
        expected = (best, int(seen[best])) if limit and seen[best] <= near else (-1, near + 1)
        assert (numbers[spot], far[spot]) == expected
    pairs = {(i, j, distances[i, j]) for i, j in combinations(range(len(values)), 2) if distances[i, j] <= near}
    assert set(zip(*index.among(signatures(words)))) == pairs


def test_what_has_no_signature_is_like_nothing() -> None:
    rows = Signatures(words=np.zeros((3, 1), np.uint64), valid=np.array([False, True, False]))
    index = Index(words=1, near=3, banding=SMALL)
    index.add(rows)
    assert index.nearest(rows, np.full(3, 3))[0].tolist() == [-1, 1, -1]
    assert index.among(rows)[0].tolist() == []


@pytest.mark.parametrize("flips", (0, 1))
def test_recall_is_as_it_is_told(flips: int) -> None:
    """Also that the growth of the table loses nothing: 4,000 samples are linked anew several times."""
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**64, (4000, 4), np.uint64)
    banding = Banding(bands=10, bits=25, flips=flips)
    index = Index(words=4, near=40, banding=banding)
    for start in range(0, 4000, 250):
        index.add(signatures(words[start : start + 250]))
    sure = banding.bands * (flips + 1) - 1
    for distance in (0, 5, sure, 24, 31, 40):
        numbers, _ = index.nearest(signatures(flipped(words, rng, distance)), np.full(4000, 4000))
        assert set(numbers.tolist() - np.arange(4000)) <= {0, *(-1 - np.arange(4000))}  # itself, or none
        told = banding.recall(distance, 256)
        assert abs(np.mean(numbers >= 0) - told) < 0.03 and (told == 1) == (distance <= sure)
    assert index.crowded == 0


def test_a_crowded_bucket_is_cut_off_and_counted() -> None:
    rng = np.random.default_rng(1)
    words = rng.integers(0, 2**64, (50, 4), np.uint64)
    words[:, 0] = 7  # the one band is cut from it
    index = Index(words=4, near=8, banding=Banding(bands=1, bits=25, flips=0, most=10))
    index.add(signatures(words))
    numbers, _ = index.nearest(signatures(words), np.full(50, 50))
    assert numbers.tolist() == [-1] * 40 + list(range(40, 50))  # the latest are looked at
    assert index.crowded == 50


def test_the_distance_may_leave_out_the_words_that_bands_are_cut_from() -> None:
    words = np.array([[1, 0], [1, 2**40 - 1], [3, 0]], np.uint64)
    index = Index(words=1, near=0, banding=SMALL, extra=1)
    index.add(signatures(words))
    # The first two words agree, but of all four bands some three differ.
    assert list(zip(*index.among(signatures(words)))) == []
    assert index.nearest(signatures(words), np.array([0, 1, 2]))[0].tolist() == [-1, -1, -1]
    assert index.nearest(signatures(words), np.full(3, 3))[0].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "settings_", ({"bands": 0}, {"bits": 3}, {"bits": 65}, {"flips": 2}, {"most": 0}), ids=lambda s: next(iter(s))
)
def test_impossible_bandings_are_refused(settings_: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        Banding(**settings_)
    with pytest.raises(ValueError, match="more than a signature has"):
        Index(words=1, near=3, banding=Banding(bands=5, bits=13))
