"""The console of a run: bars with the time left where there is a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text


class RunProgress:
    """How far a run of some phases has come: a bar for the phase, and one for all of them if they are several."""

    def __init__(self, name: str, phases: Sequence[int], console: Console | None = None) -> None:
        """`phases` are their samples, `name` stands before every line."""
        self.name, self.phases, self.total = name, phases, sum(phases)
        self._console = console or Console(file=sys.stdout)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bars = Progress(*columns, console=self._console, auto_refresh=False, speed_estimate_period=600)
        self._figures = ""
        self._live = Live(get_renderable=self._shown, console=self._console, refresh_per_second=2)
        self._phase: TaskID | None = None
        self._whole: TaskID | None = None

    @property
    def _is_live(self) -> bool:
        return self._console.is_terminal

    def _shown(self) -> Group:
        return Group(self._bars, Text(self._figures))

    def close(self) -> None:
        """Leaves the bars as they are."""
        self._live.stop()

    def advance(self, samples: int, phase: int, position: int) -> None:
        """Says how far the run is: samples of it, and position in the phase."""
        if not self._is_live:
            return
        if self._phase is None:
            self._phase = self._bars.add_task("", completed=position)
            if len(self.phases) > 1:
                self._whole = self._bars.add_task("all phases", total=self.total, completed=samples)
            self._live.start()
        told = f"phase {phase + 1}/{len(self.phases)}"
        if self._bars.tasks[0].description != told:
            self._bars.reset(self._phase, total=self.phases[phase], description=told, completed=position)
        self._bars.update(self._phase, completed=position)
        if self._whole is not None:
            self._bars.update(self._whole, completed=samples)

    def log(self, entry: dict[str, Any]) -> None:
        """Shows a line of the log."""
        if self._is_live:
            self._figures = figures_of(entry)
        else:
            self.say(line_of(entry, self.total, len(self.phases)))

    def say(self, text: str) -> None:
        """One line, above the bars."""
        if self._is_live:
            self._console.print(f"{self.name}: {text}", markup=False, highlight=False)
        else:
            print(f"{self.name}: {text}", flush=True)


def figures_of(entry: dict[str, Any]) -> str:
    """Loss, rate, speed, share of the machine, memory and samples that could not be used of a line of the log."""
    loss = "none" if entry["loss"] is None else f"{entry['loss']:.4f}"
    told = [f"loss {loss}", f"rate {entry['lr']:.2e}", f"{entry['samples_per_second']:.1f}/s"]
    if entry.get("share") is not None:
        told.append(f"{entry['share']:.1%} of the machine")
    told.append(f"{entry['memory']:.1f} GiB")
    if entry.get("bad"):
        told.append(f"bad {entry['bad']:,}")
    return "  ".join(told)


def line_of(entry: dict[str, Any], total: int, phases: int) -> str:
    """A line of the log for a console without bars; the time left is at the present speed."""
    left = (total - entry["samples"]) / max(entry["samples_per_second"], 1e-9)
    where = f"phase {entry['phase'] + 1}/{phases}  {entry['samples']:,}/{total:,} samples"
    return f"{where}  {figures_of(entry)}  {timedelta(seconds=round(left))} left"
