"""The funnel: at every stage, in = kept + dropped by reason + failed by reason. Counted from the tables themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from .plan import Ticket
from .stage import Stage
from .storage import Folder
from .tables import TableName, read_table

READERS = 8  # tables asked for at a time: elsewhere each is a wait


@dataclass(frozen=True, kw_only=True)
class FunnelRow:
    """What became of the rows that one stage was given."""

    given: int
    kept: int
    dropped: dict[str, int]
    failed: dict[str, int]

    def as_json(self) -> dict[str, object]:
        """With the names that `summary.json` and `run.json` use."""
        return {"in": self.given, "kept": self.kept, "dropped": self.dropped, "failed": self.failed}


def count_funnel(dataset: Folder, stages: Sequence[Stage], tickets: Sequence[Ticket]) -> dict[str, FunnelRow]:
    """Per stage name, over the tables that the tickets name."""
    funnel = {}
    with ThreadPoolExecutor(READERS) as readers:
        for stage in stages:
            tables = [t.tables[stage.name] for t in tickets if stage.name in t.tables]
            counts: Counter[tuple[str, str]] = Counter()
            for found in readers.map(partial(_count_ends, dataset), tables):
                counts.update(found)
            funnel[stage.name] = _row_of(counts)
    return funnel


def _count_ends(dataset: Folder, table: TableName) -> dict[tuple[str, str], int]:
    if table.kept == table.rows:  # its name says it all
        return {("kept", ""): table.rows}
    rows = read_table(dataset, table, ["status", "reason"])
    ends = rows.group_by(["status", "reason"]).aggregate([([], "count_all")])
    return {(r["status"], r["reason"] or ""): r["count_all"] for r in ends.to_pylist()}


def _row_of(counts: Counter[tuple[str, str]]) -> FunnelRow:
    ends = {status: {r: n for (s, r), n in sorted(counts.items()) if s == status} for status in ("dropped", "failed")}
    return FunnelRow(
        given=sum(counts.values()), kept=counts[("kept", "")], dropped=ends["dropped"], failed=ends["failed"]
    )
