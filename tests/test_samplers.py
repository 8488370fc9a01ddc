"""Samplers: made from the denoiser's own settings, refused where they cannot follow it, noise by the picture's seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from tests.tiny_denoisers import make_pixart, make_sana, make_sdxl, make_unet
from tests.training_fixtures import language_model_config, make_language_model, tsc_config
from training.bridge import Bridge
from training.configuration import Sampler
from training.denoisers import DenoiserConfig
from training.generation import generate
from training.samplers import FLOW, STOCHASTIC, scheduler_of, set_steps


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("samplers")
    make_language_model(root / "models" / "t5")
    make_unet(root / "unet", prediction_type="v_prediction")
    make_sana(root / "sana")
    return root


def parts_of(root: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "language_model": language_model_config(root).load(),
        "bridge": Bridge(tsc_config()).eval(),
        "denoiser": DenoiserConfig(model=str(root / "unet")).load(),
    }


@pytest.mark.parametrize("sampler", get_args(Sampler))
def test_a_picture_depends_on_its_seed_alone(root: Path, sampler: Sampler) -> None:
    parts = parts_of(root)
    settings: dict[str, Any] = {"resolution": 8, "steps": 3, "guidance": 2.0, "sampler": sampler}
    two = generate(**parts, **settings, prompts=["red", "red"], seeds=[1, 2], batch=2)
    one = generate(**parts, **settings, prompts=["red"], seeds=[2], batch=1)
    assert two.std() > 5 and np.abs(two[1].astype(int) - one[0].astype(int)).max() <= 1
    assert not np.array_equal(two[0], two[1])
    again = generate(**parts, **settings, prompts=["red", "red"], seeds=[1, 2], batch=2)
    assert np.array_equal(two, again)  # also where noise is drawn at each step
    assert (sampler in STOCHASTIC) == (sampler in ("euler_a", "ddpm"))


def test_samplers_without_noise_of_their_own_come_to_the_same_picture(root: Path) -> None:
    parts = parts_of(root)
    settings: dict[str, Any] = {
        "resolution": 8,
        "steps": 100,
        "guidance": 2.0,
        "prompts": ["red"],
        "seeds": [1],
        "batch": 1,
    }
    drawn = {s: generate(**parts, **settings, sampler=s)[0].astype(int) for s in ("ddim", "euler", "dpm++", "unipc")}
    other = generate(**parts, **{**settings, "seeds": [2]})[0].astype(int)
    assert np.abs(other - drawn["ddim"]).mean() > 20
    for sampler, picture in drawn.items():
        assert np.abs(picture - drawn["ddim"]).mean() < 1, sampler


@pytest.mark.parametrize("kind", ["sde-dpmsolver++", "sde-dpmsolver", "dpmsolver"])
def test_a_base_with_a_solver_that_adds_noise(root: Path, kind: str) -> None:
    """DPM++ is taken without it: a picture depends on its seed alone, and nobody else's random numbers are drawn."""
    parts = parts_of(root)
    parts["denoiser"].scheduler = {**parts["denoiser"].scheduler, "algorithm_type": kind}
    settings: dict[str, Any] = {"resolution": 8, "steps": 3, "guidance": 2.0}
    for sampler in ("dpm++", "unipc"):
        before = torch.get_rng_state()
        two = generate(**parts, **settings, sampler=sampler, prompts=["red", "red"], seeds=[1, 2], batch=2)
        one = generate(**parts, **settings, sampler=sampler, prompts=["red"], seeds=[2], batch=1)
        assert np.abs(two[1].astype(int) - one[0].astype(int)).max() <= 1
        assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (make_unet, {"beta_schedule": "scaled_linear", "beta_end": 0.012, "steps_offset": 1}),
        (make_sdxl, {"beta_schedule": "scaled_linear", "beta_end": 0.012, "timestep_spacing": "leading"}),
        (make_pixart, {"beta_schedule": "linear", "beta_end": 0.02}),
    ],
)
def test_settings_are_the_denoisers_own(tmp_path: Path, make: Any, wanted: dict[str, Any]) -> None:
    denoiser = DenoiserConfig(model=str(make(tmp_path / "model"))).load(with_vae=False)
    levels = denoiser.levels.signal.square()
    for sampler in get_args(Sampler):
        scheduler = scheduler_of(denoiser, sampler)
        assert {name: scheduler.config[name] for name in wanted} == wanted, sampler
        assert torch.allclose(scheduler.alphas_cumprod, levels, atol=1e-6), sampler
        assert not scheduler.config.get("clip_sample"), sampler


def test_flows(root: Path) -> None:
    denoiser = DenoiserConfig(model=str(root / "sana")).load(with_vae=False)
    for sampler in get_args(Sampler):
        if sampler not in FLOW:
            with pytest.raises(ValueError, match=f"sampler '{sampler}' cannot draw with a flow: choose auto, euler"):
                scheduler_of(denoiser, sampler)
            continue
        scheduler = scheduler_of(denoiser, sampler)
        set_steps(scheduler, 4, torch.device("cpu"))
        assert scheduler.config.get("shift", scheduler.config.get("flow_shift")) == 3.0
        sigmas, even = scheduler.sigmas[:-1].double(), torch.arange(4, 0, -1).double() / 4
        assert torch.allclose(sigmas, 3 * even / (1 + 2 * even), atol=2e-3), sampler
        assert torch.allclose(scheduler.timesteps.double(), 1000 * sigmas, atol=1), sampler


def test_a_sampler_that_is_none(root: Path) -> None:
    denoiser = DenoiserConfig(model=str(root / "unet")).load(with_vae=False)
    with pytest.raises(ValueError, match="there is no sampler 'eular': perhaps you meant euler"):
        scheduler_of(denoiser, "eular")  # type: ignore[arg-type]
