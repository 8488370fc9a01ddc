"""The funnel: at every stage, in = kept + dropped by reason + failed by reason. Counted from the tables themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .plan import Ticket
from .stage import Stage
from .storage import Folder
from .tables import read_table


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
    for stage in stages:
        counts: Counter[tuple[str, str]] = Counter()
        for ticket in tickets:
            if stage.name in ticket.tables:
                table = read_table(dataset, ticket.tables[stage.name], ["status", "reason"])
                statuses, reasons = table.column("status").to_pylist(), table.column("reason").to_pylist()
                counts.update(zip(statuses, (r or "" for r in reasons), strict=True))
        ends = {
            status: {r: n for (s, r), n in sorted(counts.items()) if s == status} for status in ("dropped", "failed")
        }
        funnel[stage.name] = FunnelRow(
            given=sum(counts.values()), kept=counts[("kept", "")], dropped=ends["dropped"], failed=ends["failed"]
        )
    return funnel
