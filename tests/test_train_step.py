"""The benchmark's loops train the same thing, and its figures are of pairs."""

from __future__ import annotations

import json

import pytest

from benchmarks import train_step


def test_it_runs_and_tells_its_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    train_step.main(["--samples", "8", "--batch", "4", "--steps", "1", "--rounds", "2"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    for clock in ("wall", "cpu"):
        assert set(found[clock]["seconds_a_step"]) == {"ours", "step", "bare", "diffusers", "loader"}
        assert all(seconds > 0 for seconds in found[clock]["seconds_a_step"].values())
        assert all(
            found[clock][name][1] <= found[clock][name][0] <= found[clock][name][2] for name in train_step.RATIOS
        )


def test_ratios_are_of_the_same_round() -> None:
    pairs = {"ours": [(1.0, 2.0), (10.0, 4.0)], "bare": [(1.0, 1.0), (9.0, 4.0)]}
    others = {"diffusers": pairs["ours"], "step": pairs["ours"], "loader": [(0.1, 0.5)] * 2}
    found = train_step.summary(pairs | others)
    assert found["wall"]["ours_to_bare"] == pytest.approx([0.95, 0.9, 1.0])
    assert found["cpu"]["ours_to_bare"] == pytest.approx([0.75, 0.5, 1.0])
    assert found["wall"]["loader_to_step"] == pytest.approx([55, 10, 100])
