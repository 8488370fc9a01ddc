"""What the jobs show on the terminal: the plan, live progress per stage, the funnel."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table

from pipeline.compute import Progress
from pipeline.funnel import FunnelRow
from pipeline.plan import Plan
from pipeline.reasons import Work

from .estimates import Estimate

console = Console()


def print_plan(work: Sequence[Work], costs: Mapping[str, Estimate]) -> None:
    """What is there, what is to be done and why, and what it costs; a line a stage."""
    table = Table(title="plan (partitions; rows as far as names tell)", title_justify="left")
    told = any(item.fresh and item.stage.name in costs for item in work)
    for name in ("stage", "done", "to do", "new rows", "reused", *(("seconds", "GPU-hours") if told else ())):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for item in work:
        cost = costs.get(item.stage.name) if item.fresh else None
        numbers = (item.to_compute, item.fresh, item.rows - item.fresh)
        price = ([f"{cost.seconds:.0f}", f"{cost.gpu_hours:.2f}"] if cost else ["", ""]) if told else []
        table.add_row(item.stage.name, str(item.up_to_date), *(str(n or "") for n in numbers), *price)
    console.print(table)
    for item in work:
        for reason, count in item.reasons.items():
            print(f"  {item.stage.name}: {reason} ({count} partition{'s' if count > 1 else ''})")
    walls = [costs[item.stage.name].wall_seconds(item.stage) for item in work if item.stage.name in costs]
    unknown = [item.stage.name for item in work if item.fresh and item.stage.name not in costs]
    if any(walls):
        print(f"about {max(walls):.0f} s with all the workers that the recipe allows, by the rates of earlier builds")
    if unknown and walls:
        print(f"no rate is known yet of: {', '.join(unknown)}")


def print_funnel(funnel: dict[str, FunnelRow]) -> None:
    """In = kept + dropped + failed, a line a stage."""
    table = Table("stage", "in", "kept", "dropped", "failed", title="funnel", title_justify="left")
    for name, row in funnel.items():
        table.add_row(name, str(row.given), str(row.kept), _reasons(row.dropped), _reasons(row.failed))
    console.print(table)


def _reasons(counts: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in counts.items())


@dataclass(kw_only=True)
class Done:
    """What the workers of a stage did in a run."""

    rows: int = 0
    """Rows computed, without those that were taken over."""
    seconds: float = 0.0
    """That computing took, over all workers."""


class StageProgress:
    """Live progress, a line a stage: rows, rate, time left, what ended. Plain lines where there is no terminal."""

    def __init__(self, plan: Plan) -> None:
        self.done: dict[str, Done] = {s.stage.name: Done() for s in plan.stages if s.to_compute}
        self._total = {s.stage.name: s.rows for s in plan.stages if s.to_compute}
        self._rows: Counter[str] = Counter()
        self._ends: dict[str, Counter[str]] = {name: Counter() for name in self._total}
        self._first: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._live = Live(self._table(), console=console, refresh_per_second=2, transient=True)
        self._shown = time.monotonic()

    def __enter__(self) -> StageProgress:
        if console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if console.is_terminal:
            self._live.stop()
        elif self._rows:
            self._print_line()

    def report(self, progress: Progress) -> None:
        """Takes in what a worker tells."""
        name, now = progress.stage, time.monotonic()
        self._first.setdefault(name, now - progress.seconds)
        self._last[name] = now
        self._rows[name] += progress.rows
        self._ends.setdefault(name, Counter()).update(progress.ends)
        done = self.done.setdefault(name, Done())
        done.rows, done.seconds = done.rows + progress.computed, done.seconds + progress.seconds
        if console.is_terminal:
            self._live.update(self._table())
        elif now - self._shown > 10:
            self._print_line()

    def _print_line(self) -> None:
        self._shown = time.monotonic()
        parts = []
        for name, total in self._total.items():
            rate, left = self._pace(name)
            pace = [f"{rate:.1f}/s"] * bool(rate) + [f"{left} left"] * bool(left)
            parts.append(", ".join([f"{name} {self._rows[name]} of {total}", *pace]))
        print(f"  {time.strftime('%H:%M:%S')}  " + " | ".join(parts), file=sys.stdout, flush=True)

    def _pace(self, name: str) -> tuple[float, str]:
        """Rows a second, and the time that the rest takes then."""
        rows, spent = self._rows[name], self._last.get(name, 0.0) - self._first.get(name, 0.0)
        rate = rows / spent if spent > 0 else 0.0
        return rate, f"{max(0, self._total[name] - rows) / rate:.0f} s" if rate else ""

    def _table(self) -> Table:
        table = Table("stage", "rows", "of at most", "rows/s", "left", "dropped and failed")
        for name, total in self._total.items():
            rows, ended = self._rows[name], self._ends[name]
            rate, left = self._pace(name)
            told = ", ".join(f"{e.split(':', 1)[1]} {n}" for e, n in sorted(ended.items()))
            table.add_row(name, str(rows), str(total), f"{rate:.1f}" if rate else "", left, told)
        return table
