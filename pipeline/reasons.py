"""Why a build would do what it would do, and how many rows it would compute. From names, and at most one small settings
file of each stage: no data file is opened.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .earlier import is_sibling, sibling_folders
from .plan import Plan, StagePlan, depends_on, find_table, input_id
from .sample import LISTED
from .settings import describe, differences, read_settings
from .stage import Stage
from .storage import Folder
from .tables import TableName, list_tables


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a build would do for one stage."""

    stage: Stage
    up_to_date: int
    """Partitions."""
    to_compute: int
    """Partitions whose table would be made."""
    rows: int
    """Rows of those tables. Where a table before them comes out as it was, they are not made after all."""
    fresh: int
    """Of them, rows that the stage itself would be given; the others are taken over from earlier tables."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Why, with the partitions of which it is true."""


def find_work(dataset: Folder, plan: Plan) -> list[Work]:
    """The plan with its reasons, a stage each."""
    stages = [s.stage for s in plan.stages]
    fresh: list[dict[int, int]] = []  # per stage: by partition, rows to compute
    found = []
    for index, here in enumerate(plan.stages):
        needed = {s.name for s in depends_on(stages, index)}
        before = [(p, f) for p, f in zip(plan.stages, fresh, strict=False) if p.stage.name in needed]
        judge = _Judge(dataset=dataset, plan=plan, here=here, before=before, after=plan.stages[index + 1 :])
        verdicts = {spot: judge.verdict(spot) for spot in here.missing}
        fresh.append({spot: rows for spot, (_, rows) in verdicts.items()})
        found.append(
            Work(
                stage=here.stage,
                up_to_date=here.up_to_date,
                to_compute=here.to_compute,
                rows=here.rows,
                fresh=sum(fresh[-1].values()),
                reasons=dict(Counter(reason for reason, _ in verdicts.values())),
            )
        )
    return found


class _Judge:
    """Says of a partition whose table a stage lacks why that is, and how many of its rows would be computed."""

    def __init__(
        self,
        *,
        dataset: Folder,
        plan: Plan,
        here: StagePlan,
        before: Sequence[tuple[StagePlan, dict[int, int]]],
        after: Sequence[StagePlan],
    ) -> None:
        self._plan, self._here, self._before, self._after = plan, here, before, after
        self._needed = [b.stage for b, _ in before]
        self._missing = [(b.stage, set(b.missing), fresh) for b, fresh in before]
        self._changed, self._revisable = _other_settings(dataset, here) if here.missing else ({}, {})
        self._is_new = bool(here.missing and not here.tables) and read_settings(dataset, here.stage.folder) is None

    def verdict(self, spot: int) -> tuple[str, int]:
        """The reason, and the rows to compute."""
        partition, given = self._plan.tickets[spot].partition, self._here.given[spot]
        tables = self._here.tables.get(partition.name, [])
        if not partition.content_id:
            return "new rows", given
        if not tables:
            return self._never_made(partition.name), given - self._revisable.get(partition.name, 0)
        same = find_table(tables, self._here.wanted[spot])
        if same:  # it counts as missing because of its failures
            return "retried rows", same.transient
        rows = max(self._computed_before(spot, given), given - max(t.rows for t in tables))
        late = next((stage.name for stage, missing, _ in self._missing if spot in missing), None)
        if late:
            return f"after {late}", rows
        if LISTED in self._here.stage.reads and partition.absent and self._was_made_of_all(spot, tables):
            return "rows left the source", rows
        if self._here.stage.whole:
            return "other rows in the dataset", rows
        if self._here.stage.ordered and spot > self._here.missing[0]:
            return "after an earlier partition", rows
        return ("takedown" if partition.has_shrunk and not self._before else "other rows before it"), rows

    def _was_made_of_all(self, spot: int, tables: Sequence[TableName]) -> bool:
        """Whether a table was made when the source listed all of the partition's rows."""
        ticket = self._plan.tickets[spot]
        whole = replace(ticket, partition=replace(ticket.partition, absent=""))
        return find_table(tables, input_id(self._here.stage, self._needed, whole, "")) is not None

    def _computed_before(self, spot: int, given: int) -> int:
        """Rows that stages before would compute anew and whose columns this one reads."""
        reads = set(self._here.stage.reads)
        rows = [f.get(spot, 0) for s, _, f in self._missing if reads & {*s.writes.names, *s.payload}]
        return min(given, max(rows, default=0))

    def _never_made(self, name: str) -> str:
        if name in self._changed:
            return self._changed[name]
        if any(name in stage.tables for stage in self._after):
            return "new stage" if self._is_new else "missing file"
        if not any(name in stage.tables for stage in self._plan.stages):
            return "new rows"
        return "new stage" if self._is_new else "not made yet"


def _other_settings(dataset: Folder, here: StagePlan) -> tuple[dict[str, str], dict[str, int]]:
    """By partition: what changed since the settings under which the stage worked on it before, and how many of those rows
    it judges anew instead of computing them (at least).
    """
    others = sibling_folders(dataset, here.stage)
    changed: dict[str, str] = {}
    revisable: dict[str, int] = {}
    now = describe(here.stage) if others else {}
    sets: list[tuple[dict[str, list[TableName]], list[str]]] = []
    for other in others:
        then = read_settings(dataset, other)
        tables = list_tables(dataset, other, with_tar=False)
        sets.append((tables, differences(then, now) if then else []))
        if then and is_sibling(here.stage, then, now) and not _is_older(here.stage, then, now):
            for name, found in tables.items():
                revisable[name] = max(revisable.get(name, 0), found[0].kept)
    # Where it worked under several, the ones that differ least.
    for tables, changes in sorted(sets, key=lambda pair: (not pair[1], len(pair[1])), reverse=True):
        text = "changed setting" + (": " + "; ".join(changes) if changes else "")
        changed |= dict.fromkeys(tables, text)
    return changed, revisable


def _is_older(stage: Stage, then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether the first setting that can be revised was lower: what it asks for anew is asked for anew."""
    first = stage.revisable[0]
    return then["identity"].get(first, 0) < now["identity"].get(first, 0)
