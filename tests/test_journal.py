"""What a run writes down: lines of the log, what the trackers get, and what a cut-off sitting leaves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.storage import Folder
from tests.training_fixtures import make_world, training_config
from training import journal, loop
from training.batches import BadSample, Batches
from training.checkpoints import State
from training.flops import Peak, sample_flops
from training.journal import MEASURED, Journal
from training.loop import train
from training.model_configuration import LoRAConfig
from training.parts import batch_config, load_parts
from training.phases import Phase
from training.processes import start_processes
from training.views import open_views

PHASE = Phase(view="small", resolution=8, samples=48, batch=12, micro_batch=6)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def state_at(samples: int, **of_window: Any) -> State:
    return State(step=samples // 12, samples=samples, position=samples, **of_window)


class Recorded:
    """A tracker that keeps what it is given."""

    def __init__(self) -> None:
        self.given: list[tuple[dict[str, float], int]] = []
        self.pictures: list[tuple[str, int]] = []
        self.closed = False

    def scalars(self, values: dict[str, float], samples: int) -> None:
        self.given.append((values, samples))

    def picture(self, name: str, picture: object, samples: int) -> None:
        self.pictures.append((name, samples))

    def close(self) -> None:
        self.closed = True


def test_a_line_is_over_the_steps_since_the_last(tmp_path: Path) -> None:
    with Journal(tmp_path, main=True, samples=0, phases=[PHASE]) as written:
        written.measured(Peak(device="a device", flops=500.0, measured="measured"), 2)
        written.counted(20)
        state = state_at(24, window=[[6.0, 0.0], [3.0, 0.0]], window_samples=24, window_seconds=2.0, seconds=5.0)
        assert written.log(state, 1e-3, float("inf"), {"grad_norms": {"pool": 1.0}}) == 2.0
        assert (state.window, state.window_samples, state.window_seconds) == (None, 0, 0.0)
    (line,) = lines(tmp_path)
    assert (line["loss"], line["bins"], line["grad_norm"], line["grad_norms"]) == (
        2.0,
        [2.0, None],
        None,
        {"pool": 1.0},
    )
    assert (line["samples_per_second"], line["flops"], line["share"]) == (12.0, 240.0, 0.24)
    assert line["memory"] > 0 and line["waiting"] == 0.0


def test_without_a_peak_nothing_is_said_of_the_machine(tmp_path: Path) -> None:
    with Journal(tmp_path, main=True, samples=0, phases=[PHASE]) as written:
        written.log(state_at(12), 1e-3, 1.0)
    assert "share" not in lines(tmp_path)[0] and "flops" not in lines(tmp_path)[0]


def test_waiting_for_samples_is_a_share_of_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.5, 10.0, 10.25, 20.0])  # before and after each batch, and before the end
    monkeypatch.setattr(journal.time, "monotonic", lambda: next(clock))
    with Journal(tmp_path, main=True, samples=0, phases=[PHASE]) as written:
        given = list(written.timed(["a", "b"]))  # type: ignore[list-item]
        monkeypatch.undo()
        written.log(state_at(12, window_seconds=3.0), 1e-3, 1.0)
        written.log(state_at(24, window_seconds=3.0), 1e-3, 1.0)
    assert given == ["a", "b"] and [line["waiting"] for line in lines(tmp_path)] == [0.25, 0.0]


def test_trackers_get_every_number_at_the_count_of_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker, facts = Recorded(), []
    monkeypatch.setattr(
        "training.trackers.open_tracker", lambda name, run, samples, told: facts.append(told) or tracker
    )
    with Journal(
        tmp_path, main=True, samples=0, phases=[PHASE], trackers=["wandb"], facts={"commit": "abc"}
    ) as written:
        window = [[6.0, 0.0], [3.0, 0.0]]
        written.log(
            state_at(24, window=window, window_samples=24, window_seconds=2.0), 1e-3, 0.5, {"adaln": [1.0, 2.0]}
        )
        written.scalars({"validation": {"loss": 0.25, "none": None}}, 24)
        written.picture("grid", np.zeros((2, 2, 3), np.uint8), 24)
    (values, samples), (validation, _) = tracker.given
    assert samples == 24 and not {"step", "samples", "bins/1"} & set(values)
    expected = {"loss": 2.0, "bins/0": 2.0, "adaln/0": 1.0, "adaln/1": 2.0, "grad_norm": 0.5, "lr": 1e-3}
    assert expected.items() <= values.items() and all(isinstance(one, int | float) for one in values.values())
    assert validation == {"validation/loss": 0.25} and tracker.pictures == [("grid", 24)]
    assert tracker.closed and facts == [{"commit": "abc"}]


def test_lines_beyond_the_checkpoint_go(tmp_path: Path) -> None:
    names = ("log.jsonl", "ledger.jsonl", "skipped.jsonl")
    for name in names:
        (tmp_path / name).write_text('{"samples": 12}\n{"samples": 24}\n{"samp')
    Journal(tmp_path, main=True, samples=12, phases=[PHASE])
    assert [(tmp_path / name).read_text() for name in names] == ['{"samples": 12}\n'] * 3


def test_the_first_bad_sample_of_a_shard_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = [
        BadSample(position=position, key=f"key{position}", shard=shard, reason="OSError: gone")
        for position, shard in enumerate(("a.tar", "a.tar", "b.tar"))
    ]
    for main in (True, False):
        written = Journal(tmp_path, main=main, samples=0, phases=[PHASE])
        for samples in (12, 24):
            written.bad(samples, 0, found)
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[2].partition(";")[0] for line in said] == [
        "shard a.tar: sample 'key0' weighs nothing (OSError: gone)",
        "shard b.tar: sample 'key2' weighs nothing (OSError: gone)",
    ]
    assert len((tmp_path / "ledger.jsonl").read_text().splitlines()) == 6


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    with Journal(tmp_path, main=False, samples=0, phases=[PHASE], trackers=["tensorboard"]) as written:
        assert written.log(state_at(12, window=[[1.0], [2.0]], window_seconds=1.0), 1e-3, 1.0) == 0.5
        written.scalars({"loss": 1.0}, 12)
        written.say("nothing")
    assert not list(tmp_path.iterdir())


def test_a_run_tells_which_share_of_the_machine_it_uses(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By what a sample of each phase costs; and neither counting nor measuring changes the run."""
    peak = Peak(device="a device", flops=1e12, measured="measured")
    monkeypatch.setattr(loop, "peak_of", lambda *_: peak)
    dataset = Folder(url=str(world / "dataset"))
    for run, measure in (("measured", True), ("not", False)):
        train(training_config(world, measure_peak=measure), dataset=dataset, run=tmp_path / run)
    told, plain = lines(tmp_path / "measured"), lines(tmp_path / "not")
    assert "peak measured: 1 TFLOP/s of a device" in capsys.readouterr().out
    config = training_config(world)
    parts, views = load_parts(config, start_processes(config)), open_views(config, dataset)
    for number, view in enumerate(views):
        with Batches(view, batch_config(config, number, parts)) as batches:
            counted = sample_flops(parts, next(batches)).total
        of_phase = [line for line in told if line["phase"] == number]
        speeds = [line["flops"] / counted for line in of_phase]
        assert speeds == pytest.approx([line["samples_per_second"] for line in of_phase], abs=0.01)
        assert [line["share"] for line in of_phase] == [round(line["flops"] / 1e12, 4) for line in of_phase]
    without = [{key: one[key] for key in one if key not in MEASURED} for one in told]
    assert without == [{key: one[key] for key in one if key not in MEASURED} for one in plain]


def test_norms_are_logged_and_a_resumed_run_writes_the_same(world: Path, tmp_path: Path) -> None:
    lora = LoRAConfig(targets=(r".*attn\d\.to_[qkv]",), rank=2)
    base = training_config(world)
    config = training_config(world, phases=(PHASE,), denoiser=replace(base.denoiser, lora=lora), log_every=1, clip=1e-3)
    dataset = Folder(url=str(world / "dataset"))
    train(config, dataset=dataset, run=tmp_path)
    before = lines(tmp_path)
    for line in before:
        parts = line["grad_norms"]
        assert set(parts) == {"connector", "denoiser_lora"}  # as they were before they were clipped
        assert np.hypot(*parts.values()) == pytest.approx(line["grad_norm"], rel=1e-3)
    assert len(before[0]["adaln_scale"]) == 2 and before[-1]["adaln_scale"][0] > 0
    for late in tmp_path.glob("checkpoint-*48"):
        (late / "checkpoint.json").unlink()
    train(config, dataset=dataset, run=tmp_path)
    told = [[{key: one[key] for key in one if key not in MEASURED} for one in run] for run in (before, lines(tmp_path))]
    assert told[0] == told[1]
