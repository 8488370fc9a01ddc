"""Bit signatures that differ in few bits, found among tens of millions by the bands they share.

A signature's first bits are cut into bands. Of two that differ in few bits, some band differs in none, or in one: so a
signature is only held against those that share a band with it, or all but one bit of a band (multi-index hashing,
Norouzi et al. 2012, arXiv 1307.2982; the other bit is what Lv et al. 2007 call multi-probe). With `bands` bands and one
flip each, every pair at a distance below 2·bands is found, without flips below `bands`; beyond it is a chance that
`Banding.recall` tells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np

from .flat import Flat

_MIX = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio: spreads what is near (Knuth, TAOCP 3, 6.4)
_BAND = np.uint64(0xD1B54A32D192ED03)
_LINKED = 1 << 16  # rows that are linked at a time when the chains are made anew


@dataclass(frozen=True, kw_only=True)
class Banding:
    """How signatures are looked up. Wider bands are faster and find fewer of those far apart; more bands find more."""

    bands: int = 10
    """Bands of a signature; each takes 8 to 12 bytes a sample."""
    bits: int = 25
    """Bits of a band. Choose 2^bits near the number of samples: with fewer, time grows faster than they do."""
    flips: Literal[0, 1] = 1
    """Bits of a band in which two may differ: 1 asks `bits` times as often, and finds far more."""
    most: int = 100
    """Samples looked at in one bucket, the latest first. What crowds there (a band that thousands share) is cut off and
    counted; what is found among it may then depend on the size of batches."""

    def __post_init__(self) -> None:
        if self.bands < 1 or not 4 <= self.bits <= 64:
            raise ValueError(f"need at least one band of 4 to 64 bits, got {self.bands} of {self.bits}")
        if self.flips not in (0, 1) or self.most < 1:
            raise ValueError(f"flips must be 0 or 1 and most at least 1, got {self.flips} and {self.most}")

    @property
    def masks(self) -> np.ndarray:
        """What a band is combined with (exclusive or) to make all that is looked up for it."""
        one_bit = [1 << bit for bit in range(self.bits)] if self.flips else []
        return np.array([0, *one_bit], np.uint64)

    def of(self, words: np.ndarray) -> np.ndarray:
        """The bands (rows, bands) of signatures (rows, 64-bit words)."""
        bands = np.empty((len(words), self.bands), np.uint64)
        for number in range(self.bands):
            word, shift = divmod(number * self.bits, 64)
            band = words[:, word] >> np.uint64(shift)
            if shift + self.bits > 64:
                band = band | words[:, word + 1] << np.uint64(64 - shift)
            bands[:, number] = band & np.uint64((1 << self.bits) - 1)
        return bands

    def recall(self, distance: int, width: int) -> float:
        """Chance that two signatures of `width` bits are held against each other if any `distance` bits differ, no matter
        which: one less those ways to choose the bits that leave no band with `flips` or fewer.
        """
        ways = [1] + [0] * distance  # by bits chosen in the bands so far
        for _ in range(self.bands):
            ways = [
                sum(ways[d - k] * math.comb(self.bits, k) for k in range(self.flips + 1, min(d, self.bits) + 1))
                for d in range(distance + 1)
            ]
        rest = width - self.bands * self.bits
        missed = sum(ways[d] * math.comb(rest, distance - d) for d in range(distance + 1))
        return 1 - missed / math.comb(width, distance)


@dataclass(frozen=True, kw_only=True)
class Signatures:
    """Signatures of some samples, in their order."""

    words: np.ndarray
    """uint64 (samples, words). The bands are cut from the first bits."""
    valid: np.ndarray
    """bool (samples,): where there is one. What has none is like nothing."""

    def take(self, spots: np.ndarray) -> Self:
        """Those of some of the samples."""
        return type(self)(words=self.words[spots], valid=self.valid[spots])


class Index:
    """Signatures, numbered in the order they were added, and which of them are within `near` bits of others.

    Each band's buckets are chains: `heads` holds the latest entry of a bucket (sample and band), `after` of each entry the
    one before it. So a sample takes its signature, and 8 to 12 bytes a band; nothing is sorted or moved to add one.
    """

    def __init__(self, *, words: int, near: int, banding: Banding, extra: int = 0) -> None:
        """A signature has `words` 64-bit words that count for the distance, and perhaps `extra` ones behind them, from
        which the bands are then cut.
        """
        if banding.bands * banding.bits > (extra or words) * 64:
            raise ValueError(f"{banding.bands} bands of {banding.bits} bits are more than a signature has")
        self.near, self.banding = near, banding
        self.crowded = 0
        """Lookups that were cut off at `banding.most`."""
        self._compared, self._banded = words, words if extra else 0
        # A part of the bits shows that most pairs are far apart: four times as many as may differ.
        self._part = min(words, near * 4 // 64 + 1)
        self._front, self._back = Flat(np.uint64, self._part), Flat(np.uint64, words + extra - self._part)
        self._valid = Flat(bool, 1)
        self._after = Flat(np.uint32, banding.bands)
        self._heads = np.zeros(1 << 10, np.uint32)  # number of an entry plus one; 0: none

    def __len__(self) -> int:
        return len(self._valid.rows)

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        return sum(f.rows.nbytes for f in (self._front, self._back, self._valid, self._after)) + self._heads.nbytes

    def add(self, rows: Signatures) -> None:
        """Appends samples."""
        start = len(self)
        self._front.extend(rows.words[:, : self._part])
        self._back.extend(rows.words[:, self._part :])
        self._valid.extend(rows.valid[:, None])
        self._after.extend(np.zeros((len(rows.valid), self.banding.bands), np.uint32))
        entries = self._after.rows.size
        if entries >= 2**31:
            most = 2**31 // self.banding.bands
            raise OverflowError(f"an index of {self.banding.bands} bands holds {most:,} samples: take fewer bands")
        if entries <= len(self._heads):
            return self._link(start, len(self))
        self._heads = np.zeros(1 << entries.bit_length(), np.uint32)
        for first in range(0, len(self), _LINKED):
            self._link(first, min(first + _LINKED, len(self)))

    def nearest(self, rows: Signatures, below: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(number, distance) of the nearest of the samples numbered below `below`, of equals the first; (-1, near + 1)
        where none is near.
        """
        number, distance = np.full(len(rows.valid), -1), np.full(len(rows.valid), self.near + 1)
        pairs = [spots << 32 | numbers for spots, numbers in self._looked_up(rows) if len(spots)]
        if pairs:
            pair = np.sort(np.concatenate(pairs))  # those that share several bands came several times
            pair = pair[np.diff(pair, prepend=-1) != 0]
            spots, numbers = pair >> 32, pair & 0xFFFFFFFF
            before = numbers < below[spots]
            spots, numbers, far = self._alike(rows, spots[before], self._words, numbers[before])
            order = np.lexsort((numbers, far, spots))
            best = order[np.diff(spots[order], prepend=-1) != 0]
            number[spots[best]], distance[spots[best]] = numbers[best], far[best]
        return number, distance

    def among(self, rows: Signatures) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(earlier, later, distance) of all near pairs among the rows themselves, by rising `earlier`: all are compared."""
        spots = np.flatnonzero(rows.valid)
        words = rows.words[spots, : self._part]
        if not self.near:  # what is alone with its first word is like nothing
            _, place, count = np.unique(words[:, 0], return_inverse=True, return_counts=True)
            spots, words = spots[count[place] > 1], words[count[place] > 1]
        pairs = np.nonzero(np.triu(_differing(words) <= self.near, 1))
        return self._alike(rows, spots[pairs[0]], rows.words.__getitem__, spots[pairs[1]])

    def _looked_up(self, rows: Signatures) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(spot, number) of pairs that share a bucket and are near; a pair may come several times."""
        asked = np.flatnonzero(rows.valid)
        fronts = np.ascontiguousarray(rows.words[:, : self._part])
        probes = self._bands(rows.words[asked])[:, :, None] ^ self.banding.masks
        entries = self._heads.take(self._buckets(probes)).ravel()
        spots = np.repeat(asked, probes.shape[1] * probes.shape[2])
        after = self._after.rows.reshape(-1)
        for _ in range(self.banding.most):
            there = np.flatnonzero(entries != 0)
            if not len(there):
                return
            spots, entries = spots.take(there), entries.take(there) - np.uint32(1)
            numbers = entries // np.uint32(self.banding.bands)
            far = _count(fronts.take(spots, axis=0), self._front.rows.take(numbers, axis=0))
            some = np.flatnonzero(far <= self.near)
            ours, theirs, rest = spots[some], numbers[some].astype(np.int64), slice(self._part, self._compared)
            far = far[some] + _count(rows.words[ours, rest], self._back.rows[theirs][:, : self._compared - self._part])
            yield ours[far <= self.near], theirs[far <= self.near]
            entries = after.take(entries)
        self.crowded += int(np.count_nonzero(entries))

    def _alike(
        self, rows: Signatures, spots: np.ndarray, words: Callable[[np.ndarray], np.ndarray], others: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(spot, other, distance) of those pairs that are near and of which some band agrees but for `flips` bits.

        A chain also holds what only shares a bucket, and rows of one batch are all compared: here this is made good, so
        that neither the size of an index nor of batches shows in what is found (but for what crowds).
        """
        ones, against = rows.words[spots], words(others)
        far = _count(ones[:, : self._compared], against[:, : self._compared])
        flips = np.bitwise_count(self._bands(ones ^ against)).min(axis=1, initial=64)
        alike = (far <= self.near) & (flips <= self.banding.flips)
        return spots[alike], others[alike], far[alike].astype(np.int64)

    def _words(self, numbers: np.ndarray) -> np.ndarray:
        return np.hstack([self._front.rows[numbers], self._back.rows[numbers]])

    def _bands(self, words: np.ndarray) -> np.ndarray:
        return self.banding.of(words[:, self._banded :])

    def _buckets(self, bands: np.ndarray) -> np.ndarray:
        """Where the heads of bands (rows, bands, ...) lie."""
        salt = np.arange(1, self.banding.bands + 1, dtype=np.uint64) * _BAND
        mixed = (bands + salt.reshape(-1, *[1] * (bands.ndim - 2))) * _MIX
        mixed >>= np.uint64(65 - len(self._heads).bit_length())
        return mixed.view(np.int64)

    def _link(self, start: int, end: int) -> None:
        """Puts the samples with these numbers before their chains."""
        numbers = start + np.flatnonzero(self._valid.rows[start:end, 0])
        entries = (numbers[:, None] * self.banding.bands + np.arange(self.banding.bands)).ravel()
        buckets = self._buckets(self._bands(self._words(numbers))).ravel()
        packed = np.sort(buckets << 32 | entries)  # of a bucket, by rising number
        buckets, entries = packed >> 32, packed & 0xFFFFFFFF
        first = np.diff(buckets, prepend=-1) != 0
        before = np.where(first, self._heads[buckets], np.roll(entries, 1) + 1)
        self._after.rows.reshape(-1)[entries] = before
        last = np.roll(first, -1)
        self._heads[buckets[last]] = entries[last] + 1


def _count(ones: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Bits in which rows of words differ, row by row."""
    found = np.zeros(len(ones), np.int16)
    for one, other in zip(ones.T, others.T, strict=True):
        found += np.bitwise_count(one ^ other)
    return found


def _differing(words: np.ndarray) -> np.ndarray:
    """(rows, rows) bits in which any two of the rows differ."""
    found = np.zeros((len(words), len(words)), np.uint8 if words.shape[1] < 4 else np.uint16)
    for word in words.T:
        found += np.bitwise_count(word[:, None] ^ word)
    return found
