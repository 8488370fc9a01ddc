"""Samples that cannot be used: what is known of them, and how many stand in a row."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class BadSample:
    """A sample that could not be read; it keeps its slot with weight 0."""

    position: int
    key: str
    shard: str
    """Where its picture lies."""
    reason: str


def bad_run(bad: Iterable[int], positions: range, before: int) -> tuple[int, int]:
    """The longest run of bad samples that reaches into `positions`, and the one that reaches to their end, where `before`
    ended those in front of them.
    """
    found = set(bad)
    longest = run = before
    for position in positions:
        run = run + 1 if position in found else 0
        longest = max(longest, run)
    return longest, run
