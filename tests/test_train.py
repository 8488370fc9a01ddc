"""`densebridge train --processes 2`: one line for a mistake, saved when asked to stop, then to the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from jobs.train import launch
from tests.training_fixtures import make_world

ROOT = Path(__file__).resolve().parent.parent
RECIPE = """
import dataclasses
from pathlib import Path
from jobs.recipe import Recipe
from stages.source import Source
from tests.training_fixtures import training_config
folder = Path(__file__).parent
config = training_config(folder, checkpoint_every=120)
phases = (dataclasses.replace(config.phases[0], samples=1800, micro_batch=12), config.phases[1])
recipe = Recipe(
    name="two", dataset=str(folder / "dataset"), source=Source(path="none.parquet"), stages=(), runs=str(folder / "runs"),
    trainings={"tsc": dataclasses.replace(config, phases=phases)},
)
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_world(tmp_path_factory.mktemp("world"))
    (folder / "recipe.py").write_text(RECIPE)
    return folder / "recipe.py"


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(
        ValueError, match="--processes 8, and each takes a GPU of its own, but 4 are to be seen: give 4"
    ):
        launch(["recipe.py"], 8)


def start(recipe: Path, *flags: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "jobs.cli", "train", str(recipe), "--processes", "2", *flags]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--tsc.phases.0.view", "nowhere"), "has no view 'nowhere'"),
        (
            ("--tsc.phases.0.batch", "9", "--tsc.phases.0.micro-batch", "9"),
            "choose a number of processes that divides 9",
        ),
        (("--tsc.phases.0.micro-batch", "4"), "choose a micro_batch that divides 6"),
    ],
)
def test_a_mistake_is_told_once(recipe: Path, flags: tuple[str, ...], message: str) -> None:
    _, said = start(recipe, *flags).communicate(timeout=120)
    assert said.startswith("densebridge: ") and message in said and len(said.splitlines()) == 1, said


def test_a_mistake_that_only_the_workers_see_has_no_traceback(recipe: Path) -> None:
    process = start(recipe, "--tsc.connector.in-width", "9")
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1 and "connector.in_width is 9, the models here want 16" in said
    assert all(line.startswith("densebridge: ") for line in said.splitlines()), said


def test_asked_to_stop_it_saves_and_then_goes_on(recipe: Path) -> None:
    """As often as it is asked, by either signal that batch systems send."""
    runs = recipe.parent / "runs" / "tsc"
    log = runs / "log.jsonl"
    for number in (signal.SIGTERM, signal.SIGUSR1):
        before = log.stat().st_size if log.is_file() else 0
        process = start(recipe)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if log.is_file() and log.stat().st_size > before:
                break
            time.sleep(0.05)
        process.send_signal(number)
        told, said = process.communicate(timeout=120)
        assert process.returncode == 75 and "asked to stop: saved at" in told, said
        assert ("going on from" in told) == (before > 0)
        assert list(runs.glob("checkpoint-*")) and not (runs / "release").exists()
