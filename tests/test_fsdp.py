"""Trained in pieces by two processes: the same run as with everything in each, down to its log and what it looks at."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pipeline.captions import tokenizer_id
from pipeline.storage import Folder
from tests.training_fixtures import (
    language_model_config,
    make_denoiser,
    make_language_model,
    make_view,
    training_config,
    tsc_config,
)
from training.configuration import LoRAConfig, Phase, TrainingConfig, ValidationConfig
from training.connectors import QueriesConfig
from training.fsdp import piece, scattered, whole
from training.loop import train
from training.lora import T5

# The runs that one start of two processes makes: `fsdp`, and the run from whose checkpoint at 36 samples it goes on.
RUNS = {"ddp": ("off", ""), "fsdp": ("connector", ""), "to_ddp": ("off", "fsdp"), "to_fsdp": ("connector", "ddp")}

# What takes long is to import the models' libraries: done once, and then the process parts.
SCRIPT = """
import json, os, shutil, sys
import accelerate, diffusers, torch, transformers
from accelerate.state import AcceleratorState
from dataclasses import replace
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from pathlib import Path
from pipeline.storage import Folder
from tests.test_fsdp import RUNS, config_of
from training import flops
from training.fsdp import whole_bridge
from training.loop import start_processes, train
from training.memory import held
from training.parts import load_parts
from transformers import AutoTokenizer, T5EncoderModel

def run(rank, world):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    flops._SIDES = (64,)  # what the device can do is soon said
    config, dataset = config_of(world), Folder(url=str(world / "dataset"))
    accelerator = start_processes(config)
    for name, (fsdp, other) in RUNS.items():
        if other and accelerator.is_main_process:
            shutil.copytree(world / other, world / name)
            shutil.rmtree(world / name / "checkpoint-000000060")
        accelerator.wait_for_everyone()
        train(replace(config, fsdp=fsdp), dataset=dataset, run=world / name)
    AcceleratorState._reset_state()
    config = replace(config, fsdp="connector", precision="bf16")
    parts = load_parts(config, accelerator := start_processes(config))
    sizes = [sum(t.to_local().numel() for t in ts) for ts in (parts.bridge.parameters(), parts.ema.values())]
    known = held(parts)
    text, mask, timestep = torch.randn(1, 2, 3, 16), torch.ones(1, 3, dtype=torch.bool), torch.tensor([500])
    own, copy = parts.wrapped(text, mask, timestep).tokens, whole_bridge(parts.bridge)
    assert torch.equal(copy(text, mask, timestep).tokens, own)  # by the same autocast
    assert not torch.equal(copy.at(copy.read(text, mask), mask, timestep).tokens, own)
    told = [sizes, [known.weights, known.gradients, known.moments, known.average], sorted(parts.bridge.state_dict())]
    (world / f"held-{rank}.json").write_text(json.dumps(told))
    accelerator.wait_for_everyone()

if __name__ == "__main__":
    torch.multiprocessing.start_processes(run, (Path(sys.argv[1]),), nprocs=2, start_method="fork")
"""


def config_of(world: Path, **changes: object) -> TrainingConfig:
    """A phase of 2 steps, and one of 3 that begins moments and averages anew; each step is logged, with all that is measured."""
    settings = {
        "connector": dataclasses.replace(tsc_config(), layers=2),
        "language_model": language_model_config(world, layers="all"),
        "phases": (
            Phase(view="small", resolution=8, samples=24, batch=12, micro_batch=3, rate=1e-2),
            Phase(
                view="large",
                resolution=16,
                samples=36,
                batch=12,
                micro_batch=3,
                rate=5e-3,
                optimizer="fresh",
                ema="fresh",
            ),
        ),
        "timesteps_per_encoding": 2,
        "checkpoint_every": 36,
        "keep_checkpoints": 9,
        "log_every": 1,
        "trackers": (),
        "measure_peak": True,
        "validation": ValidationConfig(
            every=24, resolution=8, view="held", samples=5, prompts=("red", "blue round"), steps=2, batch=2
        ),
    }
    return training_config(world, **{**settings, **changes})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    make_denoiser(root / "models" / "base")
    tokenizer = tokenizer_id(str(make_language_model(root / "models" / "t5", layers=2)), None)
    make_view(root / "dataset", "small", 24, tokenizer, broken=(5,))
    make_view(root / "dataset", "large", 18, tokenizer, side=16)
    make_view(root / "dataset", "held", 6, tokenizer, first=100)
    (root / "runs.py").write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    environment |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command, known = [sys.executable, "runs.py", "."], {**os.environ, **environment}
    done = subprocess.run(command, cwd=root, env=known, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return root


def lines_of(run: Path, file: str = "log.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run / file).read_text().splitlines()]


def assert_alike(run: Path, other: Path) -> None:
    """The same training but for the order in which sums over processes are taken."""
    for one, two in zip(lines_of(run), lines_of(other), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)  # clipped by the norm over all pieces
        assert one["grad_norms"] == pytest.approx(two["grad_norms"], rel=1e-3)
        for name in ("adaln_shift", "adaln_scale"):
            assert one[name] == pytest.approx(two[name], rel=1e-3)
    for one, two in zip(lines_of(run, "validation.jsonl"), lines_of(other, "validation.jsonl"), strict=True):
        assert one["held_out_loss"] == pytest.approx(two["held_out_loss"], rel=1e-4)
        pictures = [np.asarray(Image.open(folder / one["pictures"]), dtype=int) for folder in (run, other)]
        assert np.abs(pictures[0] - pictures[1]).max() <= 1
    for release, file in itertools.product(("release", "best"), ("connector", "layers", "ema.connector", "ema.layers")):
        ours, theirs = (load_file(folder / release / f"{file}.safetensors") for folder in (run, other))
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            if not name.endswith("in_proj_bias"):  # a key's bias has no gradient but rounding, which Adam makes large
                assert torch.allclose(tensor, theirs[name], atol=5e-5), name


@pytest.mark.parametrize("name", ["fsdp", "to_ddp", "to_fsdp"])
def test_in_pieces_or_not_it_is_the_same_training(world: Path, name: str) -> None:
    assert [len(lines_of(world / name, f"{file}.jsonl")) for file in ("log", "validation")] == [5, 4]
    assert lines_of(world / name)[-1]["bad"] == 1  # gradients are made larger for it
    assert_alike(world / name, world / "ddp")
    # What a sample was counted to be, but for the rounding of the speed.
    counted, expected = (
        [one["flops"] / one["samples_per_second"] for one in lines_of(folder)]
        for folder in (world / name, world / "ddp")
    )
    assert counted == pytest.approx(expected, rel=0.02)


def test_a_process_holds_its_share_and_files_hold_all(world: Path) -> None:
    told = [json.loads((world / f"held-{rank}.json").read_text()) for rank in (0, 1)]
    files = world / "fsdp" / "checkpoint-000000060"
    trained, ema, moments = (load_file(files / f"{name}.safetensors") for name in ("trained", "ema", "optimizer"))
    total = sum(tensor.numel() for tensor in trained.values())
    assert sum(tensor.numel() for tensor in ema.values()) == total
    assert sum(tensor.numel() for name, tensor in moments.items() if not name.startswith("step/")) == 2 * total
    for (weights, averages), held, names in told:
        assert names == sorted(trained)
        assert weights == averages <= 0.6 * total
        assert held == [4 * weights, 4 * weights, 8 * weights, 4 * weights]
    assert sum(weights for (weights, _), *_ in told) == total


def test_one_process_goes_on_from_the_pieces_of_two(world: Path, tmp_path: Path) -> None:
    """From the middle of a phase; with one process there is nothing to share, whatever `fsdp` says."""
    run = shutil.copytree(world / "fsdp", tmp_path / "run")
    shutil.rmtree(run / "checkpoint-000000060")
    train(config_of(world, fsdp="connector"), dataset=Folder(url=str(world / "dataset")), run=run)
    assert_alike(run, world / "ddp")


def test_what_lies_inside_frozen_models_stays_whole(world: Path) -> None:
    lora = LoRAConfig(targets=T5, rank=2, alpha=2.0)
    queries = QueriesConfig(in_width=16, width=16, queries=4)
    for changes, said in (
        ({"language_model": language_model_config(world, lora=lora)}, "LoRA and queries are read inside"),
        ({"connector": queries}, "LoRA and queries are read inside"),
        ({"precision": "fp16"}, "has no scaler for precision 'fp16'"),
    ):
        with pytest.raises(ValueError, match=said):
            training_config(world, fsdp="connector", **changes)
    with pytest.raises(ValueError, match=r"training.fsdp is 'all': choose one of off, connector"):
        dataclasses.replace(training_config(world), fsdp="all")  # type: ignore[arg-type]


def test_what_is_not_in_pieces_stays_as_it_is() -> None:
    tensor = torch.zeros(3)
    assert whole(tensor) is tensor and piece(tensor) is tensor and scattered(tensor, torch.ones(3)) is tensor
