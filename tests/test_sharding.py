"""Trained in pieces by two processes: the same losses as with everything in each, and the same checkpoints."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.storage import Folder
from tests.training_fixtures import language_model_config, log_of, make_world, training_config
from training.checkpoints import checkpoint_problem
from training.configuration import LoRAConfig
from training.connectors import QueriesConfig
from training.loop import train
from training.lora import T5
from training.sharding import scattered, whole

# The runs that one start of two processes makes: `shard`, and the run from whose middle it goes on.
RUNS = {"ddp": ("off", ""), "fsdp": ("connector", ""), "to_ddp": ("off", "fsdp"), "to_fsdp": ("connector", "ddp")}

SCRIPT = """
import json, shutil, sys
from dataclasses import replace
from pathlib import Path
from pipeline.storage import Folder
from tests.test_sharding import RUNS
from tests.training_fixtures import training_config
from training.loop import train
from training.parts import load_parts
from training.processes import start_processes

if __name__ == "__main__":
    world = Path(sys.argv[1])
    config, dataset = training_config(world, log_every=1, keep_checkpoints=9), Folder(url=str(world / "dataset"))
    accelerator = start_processes(config)
    for name, (shard, other) in RUNS.items():
        if other and accelerator.is_main_process:
            shutil.copytree(world / other, world / name)
            for samples in (48, 60, 72, 84):
                shutil.rmtree(world / name / f"checkpoint-{samples:09d}")
        accelerator.wait_for_everyone()
        train(replace(config, shard=shard), dataset=dataset, run=world / name)
    parts = load_parts(replace(config, shard="connector"), accelerator)
    held = [sum(t.to_local().numel() for t in ts) for ts in (parts.bridge.parameters(), parts.ema.values())]
    names = sorted(parts.bridge.state_dict())
    (world / f"held-{accelerator.process_index}.json").write_text(json.dumps([held, names]))
    accelerator.wait_for_everyone()
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_world(tmp_path_factory.mktemp("world"))
    (root / "runs.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "runs.py", "."]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return root


def assert_alike(run: Path, other: Path) -> None:
    """The same training but for the order in which sums over processes are taken."""
    for one, two in zip(log_of(run), log_of(other), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)  # clipped by the norm over all pieces
    for file in ("connector", "ema.connector"):
        ours, theirs = (load_file(folder / "release" / f"{file}.safetensors") for folder in (run, other))
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            if not name.endswith("in_proj_bias"):  # a key's bias has no gradient but rounding, which Adam makes large
                assert torch.allclose(tensor, theirs[name], atol=5e-5), name


@pytest.mark.parametrize("name", ["fsdp", "to_ddp", "to_fsdp"])
def test_in_pieces_or_not_it_is_the_same_training(world: Path, name: str) -> None:
    assert len(log_of(world / name)) == 7
    assert_alike(world / name, world / "ddp")


def test_a_process_holds_its_share_and_files_hold_all(world: Path) -> None:
    shares, names = zip(*(json.loads((world / f"held-{rank}.json").read_text()) for rank in (0, 1)), strict=True)
    files = world / "fsdp" / "checkpoint-000000084"
    trained, ema, moments = (load_file(files / f"{name}.safetensors") for name in ("trained", "ema", "optimizer"))
    total = sum(tensor.numel() for tensor in trained.values())
    assert sum(tensor.numel() for tensor in ema.values()) == total
    assert sum(tensor.numel() for name, tensor in moments.items() if not name.startswith("step/")) == 2 * total
    assert names[0] == names[1] == sorted(trained)
    for weights, averages in shares:
        assert weights == averages <= 0.6 * total
    assert sum(weights for weights, _ in shares) == total


def test_one_process_goes_on_from_the_pieces_of_two(world: Path, tmp_path: Path) -> None:
    """From the middle of a phase; with one process there is nothing to share, whatever `shard` says."""
    run = tmp_path / "run"
    (world / "fsdp").rename(run)
    try:
        for path in sorted(run.glob("checkpoint-*"))[-2:]:
            (path / "checkpoint.json").rename(path / "aside")
        assert [path.name for path in run.glob("checkpoint-*") if checkpoint_problem(path) is None][-1:]
        config = training_config(world, log_every=1, shard="connector")
        train(config, dataset=Folder(url=str(world / "dataset")), run=run)
        assert len(list(run.glob("damaged-*"))) == 2
        assert_alike(run, world / "ddp")
    finally:
        run.rename(world / "fsdp")


def test_what_lies_inside_frozen_models_is_not_sharded(world: Path) -> None:
    lora = LoRAConfig(targets=T5, rank=2, alpha=2.0)
    queries = QueriesConfig(in_width=16, width=16, queries=4)
    for changes, said in (
        ({"language_model": language_model_config(world, lora=lora)}, "LoRA and queries are read inside"),
        ({"connector": queries}, "LoRA and queries are read inside"),
        ({"precision": "fp16"}, "has no scaler for precision 'fp16'"),
    ):
        with pytest.raises(ValueError, match=said):
            training_config(world, shard="connector", **changes)
    with pytest.raises(ValueError, match=r"training.shard is 'all': choose one of off, connector"):
        dataclasses.replace(training_config(world), shard="all")  # type: ignore[arg-type]


def test_what_is_not_sharded_stays_as_it_is() -> None:
    tensor = torch.zeros(3)
    assert whole(tensor) is tensor and scattered(tensor, torch.ones(3)) is tensor
