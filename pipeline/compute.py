"""One partition's rows through one stage, batch by batch: what is decided already is left out, what comes back is checked."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import pyarrow as pa

from .earlier import Earlier
from .quarantine import Watch
from .rows import Batch, Given
from .sample import Status
from .stage import Columns, Stage
from .tombstones import TAKEN_DOWN


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a worker has to tell after each batch."""

    stage: str
    rows: int
    """Rows done since the last report."""
    computed: int = 0
    """Of them, those that the stage itself was given; the others were there already."""
    ends: dict[str, int] = field(default_factory=dict)
    """Rows that ended here since the last report, by `status:reason`."""
    seconds: float = 0.0
    """Time that computing them took."""


Report = Callable[[Progress], None]


class Computation:
    """Calls the stage's `process` for the batches of one partition."""

    def __init__(
        self,
        stage: Stage,
        place: str,
        *,
        earlier: Earlier,
        taken_down: frozenset[str],
        watch: Watch,
        report: Report,
    ) -> None:
        """`place` names stage and partition to the watch; `taken_down` are digests of bytes that no row may bring back."""
        self._stage, self._place, self._watch, self._report = stage, place, watch, report
        self._earlier, self._taken_down = earlier, taken_down
        self._computed, self._seconds = 0, 0.0
        self._decided: dict[str, Mapping[str, Any]] = {}

    def isolate_suspects(self, given: Given) -> None:
        """First of all the rows whose worker died, alone, so that what else the partition holds is not computed for nothing.
        Not those of an ordered stage, which must see its rows in order.
        """
        for keys in () if self._stage.ordered else self._watch.suspects(self._place):
            for batch in given.only(set(keys) - set(self._decided)).batches(len(keys)):
                columns = self._watched(batch.table)
                names = list(columns)
                found = [dict(zip(names, values, strict=True)) for values in zip(*columns.values(), strict=True)]
                self._decided |= dict(zip(batch.table.column("key").to_pylist(), found, strict=True))

    def run(self, batch: Batch) -> Columns:
        """The batch's columns: all that the stage writes, status, reason and transient."""
        keys = batch.table.column("key").to_pylist()
        rest = [spot for spot, key in enumerate(keys) if key not in self._decided]
        if len(rest) == len(keys):
            columns = self._watched(batch.table)
        else:
            fresh = self._watched(batch.table.take(pa.array(rest, pa.int64()))) if rest else {}
            order = {spot: place for place, spot in enumerate(rest)}
            columns = {
                name: [
                    fresh[name][order[spot]] if spot in order else self._decided[key][name]
                    for spot, key in enumerate(keys)
                ]
                for name in self._ended("kept", None)
            }
        self._tell(columns, len(keys))
        return columns

    def _tell(self, columns: Columns, rows: int) -> None:
        pairs = zip(columns["status"], columns["reason"], strict=True)
        ends = Counter(f"{status}:{reason}" for status, reason in pairs if status != "kept")
        progress = Progress(
            stage=self._stage.name, rows=rows, computed=self._computed, ends=dict(ends), seconds=self._seconds
        )
        self._computed, self._seconds = 0, 0.0
        self._report(progress)

    def _watched(self, table: pa.Table) -> Columns:
        """Processes the rows; those that killed a worker before by halves, and one that did so alone not at all."""
        keys = table.column("key").to_pylist()
        how = self._watch.begin(self._place, keys, self._stage.needs.deadline)
        if how == "go":
            try:
                columns = self._process(table)
            except Exception as error:
                if _is_out_of_memory(error):  # a death that the worker survived
                    return self._watched(table)
                self._watch.end(self._place, keys)
                raise
            self._watch.end(self._place, keys)
            return columns
        if how == "halve":
            half = table.num_rows // 2
            first, second = self._watched(table.slice(0, half)), self._watched(table.slice(half))
            return {name: [*first[name], *second[name]] for name in first}
        return {name: [value] for name, value in self._ended("failed", how, transient=True).items()}

    def _process(self, table: pa.Table) -> Columns:
        started, count = time.perf_counter(), table.num_rows
        found = self._stage.process(self._earlier.shown(table))
        self._seconds += time.perf_counter() - started
        self._computed += count
        columns: dict[str, Sequence[Any]] = {
            "status": ["kept"] * count,
            "reason": [None] * count,
            "transient": [False] * count,
            **found,
        }
        if self._stage.remembers:
            columns = dict(self._earlier.restored(table.column("key").to_pylist(), columns))
        check_columns(self._stage, columns, count)
        spots = [i for i, sha in enumerate(columns["sha256"]) if sha in self._taken_down] if self._taken_down else []
        for name, value in self._ended("dropped", TAKEN_DOWN).items() if spots else ():
            column = list(columns[name])
            for spot in spots:
                column[spot] = value
            columns[name] = column
        return columns

    def _ended(self, status: Status, reason: str | None, *, transient: bool = False) -> dict[str, Any]:
        """A row of which nothing else is known."""
        blank = dict.fromkeys((*self._stage.writes.names, *self._stage.payload))
        return {**blank, "status": status, "reason": reason, "transient": transient}


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's, not imported here


def check_columns(stage: Stage, columns: Columns, count: int) -> None:
    """Refuses what is not `count` rows of the stage's columns, each with an end that the funnel knows. Raises ValueError."""
    ends = {"status", "reason", "transient"}
    wanted = {*stage.writes.names, *stage.payload}
    if set(columns) - ends != wanted or any(len(v) != count for v in columns.values()):
        sizes = {name: len(v) for name, v in columns.items() if name not in ends}
        raise ValueError(f"stage {stage.name!r} must return {sorted(wanted)} with {count} rows each, got {sizes}")
    for status, reason, transient in zip(columns["status"], columns["reason"], columns["transient"], strict=True):
        if status not in get_args(Status) or (status == "kept") is not (reason is None):
            raise ValueError(
                f"stage {stage.name!r}: a row is kept, or dropped or failed with a reason, not {status} ({reason})"
            )
        if transient and status != "failed":
            raise ValueError(f"stage {stage.name!r}: only a failed row can be transient, not a {status} one ({reason})")
