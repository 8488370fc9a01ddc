"""The GPU's benchmark runs whole at toy size, and needs nothing that a bare GPU machine lacks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from benchmarks import gpu
from benchmarks.gpu_models import CASES, build_denoiser, toy
from training.configuration import SpeedConfig
from training.flops import sample_flops

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = [
    "plain loop, float32 weights",
    "trainer, frozen models in bfloat16",
    "(the same, attention without SDPA)",
    "+ channels_last",
    "+ larger micro-batch",
    "+ searched kernels",
    "+ encoding ahead",
    "+ stored latents",
    "+ stored features",
]


@pytest.fixture(autouse=True)
def as_in_a_process_of_its_own() -> Iterator[None]:
    """accelerate keeps a process's precision for good, and torch its choice of kernels."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()
    torch.backends.cudnn.benchmark = False


def test_every_setting_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["sdxl-512", "pixart-512"]
    gpu.main(["--toy", "--seconds", "0", "--compile", "off", "--deadline", "1000", "--cases", *names])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {(row["case"], row["setting"]) for row in found["rows"]} == {(n, s) for n in names for s in SETTINGS}
    assert all(row["images_per_second"] > 0 and row["share"] > 0 and not row["problem"] for row in found["rows"])
    assert found["machine"]["torch"] == torch.__version__


def test_what_fails_or_comes_too_late_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    run = gpu.Run(toy(CASES[0]), torch.device("cpu"), 1.0, 0.0, until=float("inf"))
    assert run.flops.encoding > run.flops_of_latents.encoding > 0  # the VAE's, and the language model's alone
    assert run.flops.training == run.flops_of_latents.training > 0

    def too_large() -> gpu.Step:
        raise torch.OutOfMemoryError

    assert run.measure("large", 64, too_large, 1).problem == "out of memory"
    run.until = 0.0
    assert run.measure("late", 1, too_large, 1).problem == "no time left"
    assert capsys.readouterr().out.splitlines() == [
        "sd15-512    large                                 64  out of memory",
        "sd15-512    late                                   1  no time left",
    ]


def test_flops_are_those_of_activations_alone() -> None:
    """Forwards and backwards of a frozen network are less than three times its forward pass."""
    case = toy(CASES[0])
    run = gpu.Run(case, torch.device("cpu"), 1.0, 0.0, until=0.0)
    for parameter in run.parts.denoiser.network.parameters():
        parameter.requires_grad_(True)
    with run.parts.accelerator.autocast():
        of_all = sample_flops(run.parts, case.batch(1, run.parts.denoiser))
    assert run.flops.training < 0.8 * of_all.training


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_full_shapes_are_the_published_ones(case) -> None:  # type: ignore[no-untyped-def]
    from diffusers.models.attention_processor import AttnProcessor2_0

    denoiser = build_denoiser(case, case.training(1, SpeedConfig()), torch.device("meta"))
    assert sum(p.numel() for p in denoiser.vae.parameters()) == 83_653_863
    assert denoiser.latent_shape(case.resolution) == (4, case.resolution // 8, case.resolution // 8)
    assert {type(one) for one in denoiser.network.attn_processors.values()} == {AttnProcessor2_0}  # SDPA


def test_it_needs_no_more_than_a_gpu_machine_has() -> None:
    script = "import sys, benchmarks.gpu\n"
    script += (
        "print([m for m in ('ray', 'duckdb', 'cv2', 'tyro', 'webdataset', 'pandas', 'datasets') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert out.strip().endswith("[]")
