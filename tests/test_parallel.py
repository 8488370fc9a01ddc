"""Threads that keep order, take no more than they need, and hand on errors."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from pipeline.parallel import map_ahead


def test_results_come_in_order() -> None:
    assert list(map_ahead(lambda n: n * n, range(50), 3)) == [n * n for n in range(50)]
    assert list(map_ahead(lambda n: n, [], 3)) == []


def test_items_are_taken_as_results_are() -> None:
    taken: list[int] = []

    def coming() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    results = map_ahead(lambda n: n, coming(), 2)
    assert next(results) == 0 and len(taken) == 4
    assert next(results) == 1 and len(taken) == 5
    results.close()  # type: ignore[attr-defined]
    assert len(taken) == 5


def test_work_goes_on_side_by_side() -> None:
    """Neither of two could end without the other."""
    both = threading.Barrier(2, timeout=20)
    assert sorted(map_ahead(lambda _: both.wait(), range(2), 2)) == [0, 1]


def test_an_error_is_raised_in_its_place() -> None:
    results = map_ahead(lambda n: 1 // n, [1, 2, 0, 3], 2)
    assert [next(results), next(results)] == [1, 0]
    with pytest.raises(ZeroDivisionError):
        next(results)
