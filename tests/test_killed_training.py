"""SIGKILL at any moment, also inside a checkpoint's write: the next sitting goes on, and ends as if nothing had been."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.storage import Folder
from tests.training_fixtures import make_world, training_config
from training import checkpoints, journal, whole_files
from training.checkpoints import checkpoint_problem
from training.journal import MEASURED
from training.loop import train

ROOT = Path(__file__).resolve().parent.parent
# Processes are forked from one that has the libraries loaded and has computed nothing: threads of torch do not outlive a fork.
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(
    ["tests.test_killed_training", "accelerate", "torch.utils.tensorboard", "diffusers", "transformers.models.t5"]
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def straight(world: Path) -> Path:
    assert sitting(world, world / "straight") == 0
    return world / "straight"


def trained(world: Path, run: Path, dies: int) -> None:
    """Trains, in a process that kills itself before or after the `dies`-th thing that it does to the disk."""
    count = iter(range(10_000))

    def counted(does: Any) -> Any:
        def done(*arguments: Any, **settings: Any) -> Any:
            here = next(count)
            if here == dies and here % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            found = does(*arguments, **settings)
            if here == dies:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        return done

    whole_files.sync = counted(whole_files.sync)
    checkpoints.save_weights = counted(checkpoints.save_weights)
    journal._append = counted(journal._append)
    Path.rename = counted(Path.rename)  # type: ignore[method-assign] - in a process of its own
    train(training_config(world, log_every=1), dataset=Folder(url=str(world / "dataset")), run=run)


def sitting(world: Path, run: Path, *, dies: int = -1) -> int:
    """One sitting in a process of its own; its exit code."""
    process = server.Process(target=trained, args=(world, run, dies))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def log_of(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]


def assert_same_run(run: Path, other: Path) -> None:
    """Bit for bit: losses by step and timestep, gradients, and all that is released."""
    assert len(log_of(run)) == 7 and log_of(run) == log_of(other)
    for name in ("connector.safetensors", "ema.connector.safetensors"):
        ours, theirs = (load_file(one / "release" / name) for one in (run, other))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_killed_again_and_again_it_ends_the_same(world: Path, straight: Path, tmp_path: Path) -> None:
    """The process dies while it writes, renames or prunes, from its first checkpoint to its release."""
    dice, codes = random.Random(0), []
    for _ in range(4):
        codes.append(sitting(world, tmp_path, dies=dice.randrange(20)))
        for path in tmp_path.glob("checkpoint-*"):
            assert checkpoint_problem(path) is None
    assert codes.count(-signal.SIGKILL) >= 3 and sitting(world, tmp_path) == 0
    assert_same_run(tmp_path, straight)
    assert not list(tmp_path.glob("damaged-*")) and not list(tmp_path.glob(".*-*"))


RECIPE = """
import os, signal
from pathlib import Path
from jobs.recipe import Recipe
from stages.source import Source
from tests.training_fixtures import training_config
from training import step

update, steps = step._update, iter(range(99))

def dying(*arguments):
    if os.environ["RANK"] == os.environ["DIES"] and next(steps) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return update(*arguments)

if os.environ.get("DIES"):
    step._update = dying
root = Path(__file__).parent
recipe = Recipe(
    name="two", dataset=str(root / "dataset"), source=Source(path="none.parquet"), stages=(), runs=os.environ["RUNS"],
    trainings={"tsc": training_config(root, log_every=1)},
)
"""


def two_processes(world: Path, runs: Path, *, dies: str = "") -> tuple[int, str, str]:
    """Exit code, and what `densebridge train` said; the process of rank `dies` is killed in its fifth step."""
    (world / "recipe.py").write_text(RECIPE)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RUNS": str(runs), "DIES": dies}
    command = [sys.executable, "-m", "jobs.cli", "train", str(world / "recipe.py"), "--processes", "2"]
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=240)
    return done.returncode, done.stdout, done.stderr


def test_where_one_of_two_dies_the_other_ends_too(world: Path, tmp_path: Path) -> None:
    code, _, said = two_processes(world, tmp_path / "killed", dies="1")
    lines = [line for line in said.splitlines() if line.startswith("densebridge: ")]
    assert code == 1 and "process 1 was ended by SIGKILL" in lines[-1], said
    assert "Traceback" not in said
    code, told, said = two_processes(world, tmp_path / "killed")
    assert code == 0 and "going on from" in told, said
    assert two_processes(world, tmp_path / "straight")[0] == 0
    assert_same_run(tmp_path / "killed" / "tsc", tmp_path / "straight" / "tsc")
