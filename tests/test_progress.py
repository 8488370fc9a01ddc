"""The console: bars where there is a terminal, lines elsewhere."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from training.progress import RunProgress, figures_of, line_of

ENTRY: dict[str, Any] = {
    "samples": 1200, "phase": 0, "loss": 0.25, "lr": 1e-4, "samples_per_second": 10.0, "share": 0.312, "memory": 1.5,
}  # fmt: skip


def test_a_line_says_where_a_run_is_and_when_it_ends() -> None:
    assert line_of(ENTRY, 37_200, 2) == (
        "phase 1/2  1,200/37,200 samples  loss 0.2500  rate 1.00e-04  10.0/s  31.2% of the machine  1.5 GiB  1:00:00 left"
    )
    assert figures_of(ENTRY | {"bad": 1200}).endswith("  bad 1,200") and "bad" not in figures_of(ENTRY | {"bad": 0})
    assert "of the machine" not in figures_of(ENTRY | {"share": None}) and "loss none" in figures_of(
        ENTRY | {"loss": None}
    )


def test_without_a_terminal_there_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    progress = RunProgress("tsc", [1000, 500])
    progress.advance(12, 0, 12)
    progress.log(ENTRY)
    progress.say("saved")
    progress.close()
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("tsc: phase 1/2  1,200/1,500 samples") and second == "tsc: saved"


def test_a_terminal_has_a_bar_for_the_phase_and_one_for_all() -> None:
    out = io.StringIO()
    progress = RunProgress("tsc", [1000, 500], Console(file=out, force_terminal=True, width=80))
    progress.say("[before] the bars")
    progress.advance(800, 0, 800)  # where a run goes on
    progress.log(ENTRY)
    progress.advance(1000, 0, 1000)
    progress.advance(1100, 1, 100)
    first, whole = progress._bars.tasks
    assert (first.description, first.completed, first.total) == ("phase 2/2", 100, 500)
    assert (whole.completed, whole.total) == (1100, 1500)
    progress.close()
    shown = out.getvalue()
    assert "tsc: [before] the bars" in shown and "31.2% of the machine" in shown and "phase 2/2" in shown


def test_one_phase_needs_one_bar() -> None:
    progress = RunProgress("tsc", [1000], Console(file=io.StringIO(), force_terminal=True, width=80))
    progress.advance(12, 0, 12)
    progress.close()
    assert len(progress._bars.tasks) == 1
