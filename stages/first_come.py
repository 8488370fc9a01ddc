"""Of samples that are alike the first stays: the rule that all de-duplication shares, whatever `alike` means."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.sample import KEY_LENGTH, LISTED

from .flat import Flat, from_hex, to_hex
from .near import Index, Signatures

_BLOCK = 512  # rows that are held against each other, all pairs
_KIND = 1 << 16  # a rank is the number of the kind of likeness times this, and the distance
_NONE = 1 << 30
_KEY = KEY_LENGTH // 2


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """What became of a batch's rows."""

    columns: dict[str, list[Any]]
    """status, reason, duplicate_of and evaluation_item."""
    distance: list[int | None]
    """Bits in which a dropped row's signature differs from that of what it is like; None where it is not."""


class Forbidden:
    """Samples of an evaluation set, which no row may be like."""

    def __init__(self, items: Sequence[str], indexes: Sequence[Index], kinds: Sequence[Signatures]) -> None:
        """`items` names them; for each index their signatures, which are added to it."""
        self.items, self.indexes = list(items), list(indexes)
        for index, rows in zip(indexes, kinds, strict=True):
            index.add(rows)

    def search(self, kinds: Sequence[Signatures]) -> tuple[np.ndarray, np.ndarray]:
        """(number of the item or -1, rank) for each row."""
        return _search(self.indexes, kinds, np.full(len(kinds[0].valid), len(self.items)))


class Originals:
    """The samples that stayed, numbered in their order, with one index for each kind of likeness."""

    def __init__(self, indexes: Sequence[Index]) -> None:
        self.indexes = list(indexes)
        self._keys = Flat(np.uint8, _KEY)

    def __len__(self) -> int:
        return len(self._keys.rows)

    @property
    def bytes(self) -> int:
        """Memory that they take."""
        return self._keys.rows.nbytes + sum(i.bytes for i in self.indexes)

    def search(self, kinds: Sequence[Signatures], below: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(number or -1, rank) of each row's original among those numbered below `below`."""
        return _search(self.indexes, kinds, below)

    def admit(self, keys: np.ndarray, kinds: Sequence[Signatures]) -> tuple[np.ndarray, np.ndarray]:
        """Like `search`, where each row is also held against the rows before it that stay; takes in those that do."""
        start = len(self)
        numbers, ranks = self.search(kinds, np.full(len(keys), start))
        stays = ranks == _NONE
        earlier, later, rank = _pairs(self.indexes, kinds)
        first = np.flatnonzero(np.diff(earlier, prepend=-1))
        for spot, likes in zip(earlier[first], np.split(later, first[1:])):
            if stays[spot]:  # all before it are decided
                stays[likes] = False
        nearer = stays[earlier] & (rank < ranks[later])
        earlier, later, rank = earlier[nearer], later[nearer], rank[nearer]
        order = np.lexsort((earlier, rank, later))
        best = order[np.diff(later[order], prepend=-1) != 0]
        numbers[later[best]] = start + (np.cumsum(stays) - 1)[earlier[best]]
        ranks[later[best]] = rank[best]
        self._keys.extend(keys[stays])
        for index, rows in zip(self.indexes, kinds, strict=True):
            index.add(rows.take(np.flatnonzero(stays)))
        return numbers, ranks

    def keys(self, numbers: np.ndarray) -> np.ndarray:
        """Their keys (count, 12 bytes)."""
        return self._keys.rows[numbers]


class FirstCome:
    """Holds each sample against those before it that stayed: by the first kind of likeness that finds any the nearest is its
    original, of equally near ones the first.

    What the source no longer lists is nobody's original but that of others like it: else a picture would be lost that is
    listed a second time. It stays kept all the same, for its caption may come to use again.
    """

    def __init__(self, kinds: dict[str, Callable[[], Index]], forbidden: Forbidden | None = None) -> None:
        """`kinds` tells for each kind of likeness the reason of what is dropped for it, and makes its index."""
        self._reasons = list(kinds)
        self._listed, self._unlisted = (Originals([make() for make in kinds.values()]) for _ in range(2))
        self._forbidden = forbidden

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        return self._listed.bytes + self._unlisted.bytes

    @property
    def crowded(self) -> int:
        """Lookups that were cut off for what crowded in their bucket."""
        return sum(i.crowded for o in (self._listed, self._unlisted) for i in o.indexes)

    def judge(self, batch: pa.Table, kinds: Sequence[Signatures], bad: Mapping[str, np.ndarray]) -> Verdicts:
        """The rows (key, listed) that follow those judged before, with their signatures of each kind; `bad` tells by
        reason which of them (bool) cannot be judged. Raises ValueError for a key that is none.
        """
        keys, fits = from_hex(batch.column("key"), _KEY)
        if not fits.all():
            raise ValueError(f"{batch.column('key')[int(np.argmin(fits))]} is no key: it takes {KEY_LENGTH} hex digits")
        count = len(keys)
        reasons, sound = np.full(count, None), np.ones(count, bool)
        for reason, rows in bad.items():
            reasons[rows], sound = reason, sound & ~rows
        ranks, original = np.full(count, _NONE), np.zeros((count, _KEY), np.uint8)
        items: list[str | None] = [None] * count
        if self._forbidden:
            numbers, ranks = self._forbidden.search(kinds)
            ranks[~sound] = _NONE
            for spot in np.flatnonzero(ranks != _NONE):
                items[spot], reasons[spot] = self._forbidden.items[numbers[spot]], "near_evaluation"
        rest = np.flatnonzero(sound & (ranks == _NONE))
        listed = batch.column(LISTED).to_numpy()
        for start in range(0, len(rest), _BLOCK):
            self._judge_block(rest[start : start + _BLOCK], keys, listed, kinds, ranks, original)
        found = rest[ranks[rest] != _NONE]
        reasons[found] = np.array(self._reasons, object)[ranks[found] // _KIND]
        duplicate_of = np.full(count, None)
        duplicate_of[found] = to_hex(original[found])
        status = np.where(sound, np.where(ranks == _NONE, "kept", "dropped"), "failed")
        columns = {"status": status, "reason": reasons, "duplicate_of": duplicate_of}
        return Verdicts(
            columns={**{name: values.tolist() for name, values in columns.items()}, "evaluation_item": items},
            distance=[None if r == _NONE else r % _KIND for r in ranks.tolist()],
        )

    def _judge_block(
        self,
        block: np.ndarray,
        keys: np.ndarray,
        listed: np.ndarray,
        kinds: Sequence[Signatures],
        ranks: np.ndarray,
        original: np.ndarray,
    ) -> None:
        """Fills in ranks and original keys of the rows at the spots `block`."""

        def note(spots: np.ndarray, numbers: np.ndarray, found: np.ndarray, of: Originals) -> None:
            ranks[spots] = found
            original[spots[numbers >= 0]] = of.keys(numbers[numbers >= 0])

        ours, others = block[listed[block]], block[~listed[block]]
        before = len(self._listed)
        note(ours, *self._listed.admit(keys[ours], _take(kinds, ours)), self._listed)
        if not len(others):
            return
        stayed = ours[ranks[ours] == _NONE]
        below = before + np.searchsorted(stayed, others)  # of the listed, those that come before
        numbers, found = self._listed.search(_take(kinds, others), below)
        note(others, numbers, found, self._listed)
        others = others[numbers < 0]
        note(others, *self._unlisted.admit(keys[others], _take(kinds, others)), self._unlisted)


def _take(kinds: Sequence[Signatures], spots: np.ndarray) -> list[Signatures]:
    return [rows.take(spots) for rows in kinds]


def _search(indexes: Sequence[Index], kinds: Sequence[Signatures], below: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(number or -1, rank) of what each row is like among what is numbered below `below`, by the first index that finds any."""
    numbers, ranks = np.full(len(below), -1), np.full(len(below), _NONE)
    for kind, (index, rows) in enumerate(zip(indexes, kinds, strict=True)):
        rest = np.flatnonzero(ranks == _NONE)
        number, distance = index.nearest(rows.take(rest), below[rest])
        hit = number >= 0
        numbers[rest[hit]], ranks[rest[hit]] = number[hit], kind * _KIND + distance[hit]
    return numbers, ranks


def _pairs(indexes: Sequence[Index], kinds: Sequence[Signatures]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(earlier, later, rank) of the rows that are alike in some kind, by rising `earlier`."""
    found = []
    for kind, (index, rows) in enumerate(zip(indexes, kinds, strict=True)):
        earlier, later, distance = index.among(rows)
        found.append((earlier, later, kind * _KIND + distance))
    earlier, later, rank = (np.concatenate(part) for part in zip(*found))
    order = np.argsort(earlier, kind="stable")
    return earlier[order], later[order], rank[order]
