"""Orders: whatever their kind, every row comes once in an epoch of its own, and any position can be asked for alone."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.order import SLOTS, Bucketed, Mixed, Order, Whole, Windowed, slots_of

COUNTS = st.lists(st.integers(0, 12), min_size=1, max_size=8).filter(any)
SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=5)


def windowed(counts: list[int], window: int, key: str = "key", part: str = "") -> Windowed:
    return Windowed(np.array(counts), [(f"shard-{n}",) for n in range(len(counts))], window, key, part)


def bucketed(sizes: list[int], batch: int, key: str = "key") -> Bucketed:
    """Buckets of these sizes, whose rows lie one by one: bucket b has b, b + 5, b + 10, …"""
    tables = [np.arange(size) * 5 + bucket for bucket, size in enumerate(sizes)]
    return Bucketed(tables, [Whole(size, f"{key}/{bucket}") for bucket, size in enumerate(sizes)], batch, key)


def shard_of(row: int, counts: list[int]) -> str:
    return f"shard-{int(np.searchsorted(np.cumsum(counts), row, side='right'))}"


def assert_any_start(order: Order, count: int, starts: tuple[int, ...]) -> None:
    """Asked from anywhere, in any pieces, backwards or twice: the same rows."""
    straight = order.rows(np.arange(count))
    for start in starts:
        begin = start % count
        assert np.array_equal(order.rows(np.arange(begin, count)), straight[begin:])
        assert order.rows(np.array([begin])).tolist() == [straight[begin]]
    assert np.array_equal(order.rows(np.arange(count)[::-1]), straight[::-1])


def test_the_whole_order_stays_as_it_is() -> None:
    """A checkpoint holds a position alone: what stands there must never change."""
    assert Whole(17, "3/1/manifest").rows(np.arange(14, 20)).tolist() == [3, 7, 12, 1, 15, 11]
    many = Whole(9999, "0/0/m").rows(np.arange(30_000)).astype("<i8")
    assert hashlib.sha256(many.tobytes()).hexdigest().startswith("24c5d5942610b403")


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 300), epoch=st.integers(0, 1000), starts=st.tuples(st.integers(0, 10**6)))
def test_every_row_comes_once_in_an_epoch(size: int, epoch: int, starts: tuple[int]) -> None:
    order = Whole(size, "key")
    assert np.array_equal(np.sort(order.rows(np.arange(size) + epoch * size)), np.arange(size))
    assert_any_start(order, 2 * size + 3, starts)


@settings(deadline=None, max_examples=60)
@given(counts=COUNTS, window=st.integers(1, 9), epoch=st.integers(0, 50), starts=st.tuples(st.integers(0, 10**6)))
def test_every_row_comes_once_in_a_windowed_epoch(
    counts: list[int], window: int, epoch: int, starts: tuple[int]
) -> None:
    order, size = windowed(counts, window), sum(counts)
    assert np.array_equal(np.sort(order.rows(np.arange(size) + epoch * size)), np.arange(size))
    assert_any_start(order, 2 * size + 3, starts)


@settings(deadline=None, max_examples=60)
@given(counts=COUNTS, window=st.integers(1, 9), epoch=st.integers(0, 9))
def test_a_window_holds_the_rows_of_its_shards_alone(counts: list[int], window: int, epoch: int) -> None:
    order, size = windowed(counts, window), sum(counts)
    shards = [shard_of(int(row), counts) for row in order.rows(np.arange(size) + epoch * size)]
    left, opened = Counter(shards), set()
    for place, shard in enumerate(shards):
        ahead = order.shards_ahead(epoch * size + place)
        assert shard in ahead[:window] and len(set(ahead)) == len(ahead) <= 2 * window
        opened.add(shard)
        left[shard] -= 1
        opened -= {one for one in opened if not left[one]}
        assert len(opened) <= window  # never more shards half read than a window has


def test_a_window_is_shuffled_and_shards_move_from_epoch_to_epoch() -> None:
    counts = [50] * 12
    order = windowed(counts, 3)
    rows = order.rows(np.arange(1200)).reshape(2, 4, 150)
    shards = [[sorted({shard_of(int(row), counts) for row in window}) for window in epoch] for epoch in rows]
    assert all(len(window) == 3 for epoch in shards for window in epoch) and shards[0] != shards[1]
    for window in rows.reshape(8, 150):
        assert abs(np.corrcoef(np.arange(150), window)[0, 1]) < 0.3
    assert order.shards_ahead(0)[:3] != order.shards_ahead(150)[:3]
    assert order.shards_ahead(0)[3:] == order.shards_ahead(150)[:3]
    assert set(order.shards_ahead(600)[:3]) <= set(order.shards_ahead(550))  # the next epoch's first window
    assert (order.rows(np.arange(600)) != windowed(counts, 3, "other").rows(np.arange(600))).any()


@settings(deadline=None, max_examples=60)
@given(sizes=SIZES, batch=st.integers(1, 30), starts=st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)))
def test_a_global_batch_is_of_one_bucket_and_each_sample_comes_once_in_its_epoch(
    sizes: list[int], batch: int, starts: tuple[int, int]
) -> None:
    order, epochs = bucketed(sizes, batch), 6
    batches = sum(epochs * size // batch for size in sizes)  # those of so many epochs of the view
    rows = order.rows(np.arange(batches * batch)).reshape(batches, batch)
    buckets = rows % 5
    assert (buckets == buckets[:, :1]).all()
    for bucket, size in enumerate(sizes):
        own = rows[buckets[:, 0] == bucket].reshape(-1)
        assert len(own) == epochs * size // batch * batch  # all but what is left over for the next
        for first in range(0, len(own), size):
            epoch = own[first : first + size]
            assert len(np.unique(epoch)) == len(epoch)
    if batches:
        assert_any_start(order, batches * batch, starts)


def test_buckets_take_turns_all_through_an_epoch_and_differently_in_the_next() -> None:
    order = bucketed([400, 130, 7], batch=4)
    turns = (order.rows(np.arange(4 * 300)) % 5).reshape(-1, 4)[:, 0]
    epoch = (400 + 130 + 7) // 4
    assert turns[:epoch].tolist() != turns[epoch : 2 * epoch].tolist()
    shares = [(turns[start : start + 20] == 1).mean() for start in range(0, 300, 20)]
    assert min(shares) >= 0.1 and max(shares) <= 0.4 and len(set(shares)) > 1


@settings(deadline=None, max_examples=60)
@given(
    weights=st.lists(st.integers(1, 7), min_size=2, max_size=4),
    grain=st.sampled_from([1, 3]),
    starts=st.tuples(st.integers(0, 10**6)),
)
def test_a_mixture_keeps_its_shares_and_each_views_own_order(
    weights: list[int], grain: int, starts: tuple[int]
) -> None:
    sizes = [15, 41, 67, 9][: len(weights)]
    orders = [Whole(size, str(n)) for n, size in enumerate(sizes)]
    order = Mixed(orders, sizes, weights, "key", grain)
    cycle = sum(weights)
    rows = order.rows(np.arange(5 * cycle * grain))
    firsts = np.cumsum([0, *sizes])
    sources = np.searchsorted(firsts, rows, side="right") - 1
    assert all(len(set(turn)) == 1 for turn in sources.reshape(-1, grain).tolist())
    for source, weight in enumerate(weights):
        assert ((sources.reshape(5, -1) == source).sum(1) == weight * grain).all()
        own = rows[sources == source] - firsts[source]
        assert np.array_equal(own, orders[source].rows(np.arange(len(own))))
    assert_any_start(order, len(rows), starts)


def test_slots_are_exact_where_weights_are_ratios_of_small_numbers() -> None:
    for weights, slots in (
        ((3, 1), (3, 1)), ((0.7, 0.3), (7, 3)), ((0.1, 0.2), (1, 2)), ((6, 4, 2), (3, 2, 1)), ((2.5,), (1,)),
    ):  # fmt: skip
        assert slots_of({str(n): weight for n, weight in enumerate(weights)}) == slots
    near = slots_of({"a": 23_456_789, "b": 1_234_567})
    assert sum(near) == SLOTS and abs(near[1] / SLOTS - 1_234_567 / 24_691_356) <= 1 / SLOTS
    with pytest.raises(ValueError, match="view 'b' weighs less than one part in 1024 of its mixture"):
        slots_of({"a": 10_000, "b": 1})


def test_what_is_ahead_of_buckets_and_mixtures_is_what_each_of_them_reads() -> None:
    counts = [[4, 3, 5, 2, 6, 4], [3, 2, 4, 3, 5, 2]]
    tables = [np.arange(24), np.arange(24, 43)]
    orders = [windowed(of, 2, part=str(n)) for n, of in enumerate(counts)]
    buckets = Bucketed(tables, orders, 4, "key")
    other = Windowed(np.full(5, 6), [(f"other-{n}", f"latents-{n}") for n in range(5)], 1, "other")
    order = Mixed([buckets, other], [43, 30], [1, 1], "key", grain=4)

    def file_of(row: int) -> str:
        if row >= 43:
            return f"other-{(row - 43) // 6}"
        return shard_of(row, counts[0]) if row < 24 else shard_of(row - 24, counts[1])

    for number in range(120):
        ahead = order.shards_ahead(4 * number)
        read = {file_of(int(row)) for row in order.rows(np.arange(4 * number, 4 * number + 4))}
        assert read <= set(ahead), number
        assert {f"latents-{name[6:]}" for name in ahead if name.startswith("other")} <= set(ahead)
    assert Whole(5, "key").shards_ahead(0) == () == Mixed([Whole(5, "a")] * 2, [5, 5], [1, 1], "key").shards_ahead(3)
