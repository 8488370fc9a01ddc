"""Which rows kill their workers: a batch that was begun and never ended is halved until one row is left, which is set aside. It
counts as a failure that another try may help, for the next machine may have more memory.

A worker tells before each batch what it begins, and after it that it ended. When it dies (out of memory, a crash in a
library, a hang past its deadline), Ray starts it anew with the same partition, and it finds what it had begun. Such rows
come first and by halves, so that each further death costs no more than its own few rows.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

WORKER_DIED = "worker_died"
DEADLINE_EXCEEDED = "deadline_exceeded"
REASONS = (WORKER_DIED, DEADLINE_EXCEEDED)
DEATHS = 2  # of a row alone, before it is set aside: one may be the machine's fault


class Watch(Protocol):
    """Outlives the workers and remembers what they began."""

    worker: str
    """Names the worker that asks, also after its death and restart."""

    def begin(self, place: str, keys: Sequence[str], deadline: float) -> str:
        """Notes that a worker begins these rows at `place` (a stage and a partition). Returns how: `go`, `halve`, or the
        reason for which the row, alone by now, is set aside.
        """
        ...

    def end(self, place: str, keys: Sequence[str]) -> None:
        """Notes that these rows are done."""
        ...

    def forget(self, place: str) -> None:
        """Notes that the whole place is done. Until then halves stay known as such: their rows' values are not kept."""
        ...

    def suspects(self, place: str) -> list[list[str]]:
        """Keys of the rows that were begun at `place` and not ended; what holds others comes before them."""
        ...


@dataclass(kw_only=True)
class _Begun:
    at: float
    deaths: int = 0
    verdict: str = ""


class Ledger:
    """A watch in memory. It lives with the driver, whose own death it need not survive: a new build begins anew."""

    worker = "this process"

    def __init__(self) -> None:
        self._begun: dict[tuple[str, tuple[str, ...]], _Begun] = {}

    def begin(self, place: str, keys: Sequence[str], deadline: float) -> str:
        """See `Watch`."""
        known = self._begun.get((place, tuple(keys)))
        if known is None:
            self._begun[place, tuple(keys)] = _Begun(at=time.monotonic())
            return "go"
        if len(keys) > 1:
            return "halve"
        known.deaths += 1
        if known.deaths == DEATHS:
            hung = time.monotonic() - known.at >= deadline
            known.verdict = DEADLINE_EXCEEDED if hung else WORKER_DIED
        known.at = time.monotonic()
        return known.verdict or "go"

    def end(self, place: str, keys: Sequence[str]) -> None:
        """See `Watch`."""
        self._begun.pop((place, tuple(keys)), None)

    def forget(self, place: str) -> None:
        """See `Watch`."""
        self._begun = {where: begun for where, begun in self._begun.items() if where[0] != place}

    def suspects(self, place: str) -> list[list[str]]:
        """See `Watch`."""
        return sorted((list(keys) for where, keys in self._begun if where == place), key=len, reverse=True)
