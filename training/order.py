"""Which row stands at which position: orders without end, each a pure function of its key and the position.

`Whole` and `Windowed` shuffle the rows of a view or a bucket, epoch after epoch. `Bucketed` makes global batches of one
bucket each of them, `Mixed` draws on several views by their weights. They can be asked anywhere, in any pieces; what they
keep is small: a number a shard, a global batch of the present epoch, or a slot of the mixture's cycle.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import zip_longest
from typing import NamedTuple, Protocol

import numpy as np

from .permutation import interleaved, permuted

SLOTS = 1024
"""Most slots of a mixture's cycle: weights that are no ratios of small numbers are kept to one part in so many."""


class Order(Protocol):
    """What all orders answer."""

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """The rows at positions: int64 (n,) -> int64 (n,)."""

    def shards_ahead(self, position: int) -> tuple[str, ...]:
        """The shards (paths in the dataset folder) of the window that `position` lies in, then those of the one after it, the
        nearest first: what a cache holds, and what it fetches meanwhile. Where windows are smaller than a global batch, as a
        rare bucket's, it reads on from shards behind them. Empty where the order has no windows: any shard may be next.
        """


class Whole:
    """A keyed permutation of all rows, another one in each epoch."""

    def __init__(self, size: int, key: str) -> None:
        self.size, self.key = size, key

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """As `Order.rows`; every row comes once in each epoch of `size` positions."""
        epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), self.size)
        out = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            out[here] = permuted(places[here], self.size, f"{self.key}/{epoch}".encode())
        return out

    def shards_ahead(self, position: int) -> tuple[str, ...]:
        """As `Order.shards_ahead`."""
        return ()


class _Windows(NamedTuple):
    """One epoch of a `Windowed` order."""

    shards: np.ndarray
    """Their numbers, as they come."""
    starts: np.ndarray
    """Rows before each shard, as they come, and in all."""
    edges: np.ndarray
    """Rows before each window, and in all."""


class Windowed:
    """Shards in a keyed order, grouped to windows; the rows inside a window in a keyed permutation. So an object store is read
    a window of whole shards at a time. All of it is another one in each epoch.
    """

    def __init__(
        self, counts: np.ndarray, names: Sequence[Sequence[str]], window: int, key: str, part: str = ""
    ) -> None:
        """`counts`: rows of each shard, int64, one after the other. `names`: the files it lies in. `part`: a bucket's name;
        all buckets of a view go through its shards in one order, side by side.
        """
        self.counts, self.names, self.window = counts, names, window
        self.key, self.part = key, part
        self.size = int(self.counts.sum())
        self._firsts = np.cumsum(self.counts) - self.counts
        self._windows = lru_cache(maxsize=4)(self._lay_out)

    def _lay_out(self, epoch: int) -> _Windows:
        shards = permuted(np.arange(len(self.counts)), len(self.counts), f"{self.key}/{epoch}/shards".encode())
        starts = np.append(0, np.cumsum(self.counts[shards]))
        return _Windows(shards, starts, np.append(starts[: -1 : self.window], self.size))

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """As `Order.rows`; every row comes once in each epoch of `size` positions."""
        epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), self.size)
        out = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            out[here] = self._of_epoch(epoch, places[here])
        return out

    def _of_epoch(self, epoch: int, places: np.ndarray) -> np.ndarray:
        shards, starts, edges = self._windows(epoch)
        windows = np.searchsorted(edges, places, side="right") - 1
        for window in np.unique(windows).tolist():
            here, first = windows == window, edges[window]
            key = f"{self.key}/{self.part}/{epoch}/{window}".encode()
            places[here] = first + permuted(places[here] - first, int(edges[window + 1] - first), key)
        turns = np.searchsorted(starts, places, side="right") - 1
        return self._firsts[shards[turns]] + places - starts[turns]

    def shards_ahead(self, position: int) -> tuple[str, ...]:
        """As `Order.shards_ahead`."""
        found: list[str] = []
        for _ in range(2):
            epoch, place = divmod(position, self.size)
            shards, edges = self._windows(epoch).shards, self._windows(epoch).edges
            window = int(np.searchsorted(edges, place, side="right")) - 1
            here = shards[window * self.window : (window + 1) * self.window]
            found += [name for shard in here[self.counts[here] > 0].tolist() for name in self.names[shard]]
            position = epoch * self.size + int(edges[window + 1])
        return tuple(dict.fromkeys(found))


class Bucketed:
    """Global batches of one bucket each. A bucket's samples come in an order of their own, epoch after epoch, cut into batches.

    In epoch e of the view, a bucket of n samples has floor((e + 1) n / B) - floor(e n / B) batches of B: what is left over
    comes with the next epoch's, so that nothing is repeated, dropped or filled up. The batches of an epoch are interleaved.
    """

    def __init__(self, tables: Sequence[np.ndarray], orders: Sequence[Order], batch: int, key: str) -> None:
        """`tables`: each bucket's rows of the view, none empty. `orders`: how it goes through them."""
        self.tables, self.orders, self.batch, self.key = tables, orders, batch, key
        self._turns = lru_cache(maxsize=4)(self._interleave)

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """As `Order.rows`; the positions of one global batch are of one bucket."""
        numbers, places = np.divmod(np.asarray(positions, dtype=np.int64), self.batch)
        out = np.empty_like(places)
        for number in np.unique(numbers).tolist():
            here = numbers == number
            bucket, turn = self._turn(number)
            out[here] = self.tables[bucket][self.orders[bucket].rows(turn * self.batch + places[here])]
        return out

    def _turn(self, number: int) -> tuple[int, int]:
        """Which bucket a global batch is of, and which of its batches it is."""
        epoch = self._epoch(number)
        before, (buckets, turns) = self._before(epoch), self._turns(epoch)
        slot = number - sum(before)
        return int(buckets[slot]), before[buckets[slot]] + int(turns[slot])

    def shards_ahead(self, position: int) -> tuple[str, ...]:
        """As `Order.shards_ahead`, of all buckets: they are read side by side."""
        number = position // self.batch
        epoch = self._epoch(number)
        before = self._before(epoch)
        done = np.bincount(self._turns(epoch)[0][: number - sum(before)], minlength=len(before)).tolist()
        return _side_by_side(
            order.shards_ahead((first + turns) * self.batch)
            for order, first, turns in zip(self.orders, before, done, strict=True)
        )

    def _interleave(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        counts = [after - before for before, after in zip(self._before(epoch), self._before(epoch + 1), strict=True)]
        return interleaved(counts, f"{self.key}/{epoch}/batches".encode())

    def _before(self, epoch: int) -> list[int]:
        """Each bucket's batches before an epoch."""
        return [epoch * len(table) // self.batch for table in self.tables]

    def _epoch(self, number: int) -> int:
        """The epoch of a batch. Up to one batch a bucket is left over, so it is one of a few: bisection finds it."""
        size = sum(len(table) for table in self.tables)
        first = number * self.batch // size
        last = (number + len(self.tables)) * self.batch // size + 1
        return first + bisect_right(range(first, last + 1), number, key=lambda epoch: sum(self._before(epoch))) - 1


class Mixed:
    """Several orders, each with its share: positions go through a cycle of slots, in which each has as many as it weighs,
    evenly spread. Rows are numbered through, the second order's behind the first's.
    """

    def __init__(
        self, orders: Sequence[Order], sizes: Sequence[int], slots: Sequence[int], key: str, grain: int = 1
    ) -> None:
        """`sizes`: rows of each. `slots`: how many it has of a cycle. `grain`: positions of one slot."""
        self.orders, self.slots, self.grain = orders, np.asarray(slots), grain
        self._firsts = np.cumsum(sizes) - np.asarray(sizes)
        self._sources, self._turns = interleaved(slots, f"{key}/mixture".encode())

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """As `Order.rows`; each order is gone through in its own sequence, which skips and repeats nothing."""
        turns, places = np.divmod(np.asarray(positions, dtype=np.int64), self.grain)
        cycles, slots = np.divmod(turns, len(self._sources))
        sources = self._sources[slots]
        own = (cycles * self.slots[sources] + self._turns[slots]) * self.grain + places
        out = np.empty_like(own)
        for source in np.unique(sources).tolist():
            here = sources == source
            out[here] = self._firsts[source] + self.orders[source].rows(own[here])
        return out

    def shards_ahead(self, position: int) -> tuple[str, ...]:
        """As `Order.shards_ahead`, of all orders: they are read side by side."""
        cycle, slot = divmod(position // self.grain, len(self._sources))
        done = cycle * self.slots + np.bincount(self._sources[:slot], minlength=len(self.orders))
        return _side_by_side(
            order.shards_ahead(turns * self.grain) for order, turns in zip(self.orders, done.tolist(), strict=True)
        )


def slots_of(weights: Mapping[str, float]) -> tuple[int, ...]:
    """How many slots of a mixture's cycle each has: exactly by weight where `SLOTS` suffice, else as nearly as they allow
    (largest remainders). Raises ValueError for a weight that comes to none.
    """
    parts = [Fraction(str(weight)) for weight in weights.values()]  # 0.1 is a tenth
    shares = [part / sum(parts) for part in parts]
    cycle = min(SLOTS, math.lcm(*(share.denominator for share in shares)))
    slots = [math.floor(share * cycle) for share in shares]
    short = sorted(range(len(shares)), key=lambda one: slots[one] - shares[one] * cycle)[: cycle - sum(slots)]
    slots = [count + (one in short) for one, count in enumerate(slots)]
    for name, count in zip(weights, slots, strict=True):
        if not count:
            raise ValueError(
                f"view {name!r} weighs less than one part in {SLOTS} of its mixture: leave it out, or raise it"
            )
    return tuple(slots)


def _side_by_side(found: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """The shards of several orders, each one's nearest before any one's next."""
    return tuple(dict.fromkeys(name for turn in zip_longest(*found) for name in turn if name is not None))
