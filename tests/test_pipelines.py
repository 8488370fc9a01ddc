"""Pipelines of diffusers under a bridge: what `generate` draws, in all that is built upon them, and the hooks' own rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny_denoisers import POOLED_WIDTH, make_pixart, make_sana, make_sdxl, make_unet
from tests.training_fixtures import WIDTH, language_model_config, make_language_model, tsc_config
from training.bridge import Bridge
from training.connectors import MLPConfig, QueriesConfig
from training.denoisers import Denoiser, DenoiserConfig
from training.generation import generate, start_noise
from training.language_models import LanguageModel
from training.pipelines import attach
from training.samplers import scheduler_of

PROMPTS = ["red round", "blue square big left small green"]
SEEDS = (1, 2)
MAKERS: dict[str, Callable[[Path], Path]] = {
    "unet": make_unet,
    "sdxl": make_sdxl,
    "pixart": make_pixart,
    "sana": make_sana,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pipelines")
    make_language_model(root / "models" / "t5")
    for name, make in MAKERS.items():
        make(root / name)
    return root


@pytest.fixture(scope="module")
def language_model(root: Path) -> LanguageModel:
    return language_model_config(root).load()


def load_denoiser(root: Path, family: str = "unet") -> Denoiser:
    denoiser = DenoiserConfig(model=str(root / family)).load()
    for name, parameter in denoiser.network.named_parameters():
        if "attn2.to_v" in name or "attn2.to_out" in name:
            parameter.data *= 10  # random weights hardly listen to the text
    return denoiser


def make_bridge(config: Any) -> Bridge:
    torch.manual_seed(0)
    bridge = Bridge(config).eval().requires_grad_(False)
    for parameter in bridge.parameters():
        parameter.data *= 3
    return bridge


def pipeline_of(denoiser: Denoiser, kind: str = "StableDiffusionPipeline", **parts: Any) -> Any:
    import diffusers

    pipeline_class = getattr(diffusers, kind)
    missing = {
        name: None
        for name in pipeline_class._get_signature_keys(pipeline_class)[0]
        if name.startswith(("text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder"))
    }
    found = {
        "vae": denoiser.vae,
        denoiser.subfolder: denoiser.network,
        "scheduler": scheduler_of(denoiser, "auto"),
        **missing,
        **parts,
    }
    if "safety_checker" in missing:
        found["requires_safety_checker"] = False
    pipeline = pipeline_class(**found)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise(denoiser: Denoiser, side: int) -> torch.Tensor:
    return torch.from_numpy(np.stack([start_noise(seed, denoiser.latent_shape(side)) for seed in SEEDS]))


def ours(language_model: LanguageModel, bridge: Bridge, denoiser: Denoiser, **changes: Any) -> np.ndarray:
    settings = {"prompts": PROMPTS, "seeds": SEEDS, "resolution": 8, "steps": 3, "guidance": 3.0, "batch": 2}
    return generate(language_model=language_model, bridge=bridge, denoiser=denoiser, **{**settings, **changes})


def theirs(pipeline: Any, told: dict[str, torch.Tensor], **changes: Any) -> np.ndarray:
    settings = {"num_inference_steps": 3, "guidance_scale": 3.0, "height": 8, "width": 8, "output_type": "np"}
    return (pipeline(**told, **{**settings, **changes}).images * 255).round().astype(np.uint8)


def close(one: np.ndarray, other: np.ndarray) -> bool:
    return int(np.abs(one.astype(int) - other.astype(int)).max()) <= 1


@pytest.mark.parametrize(
    ("family", "kind", "side"),
    [
        ("unet", "StableDiffusionPipeline", 8),
        ("sdxl", "StableDiffusionXLPipeline", 8),
        ("pixart", "PixArtSigmaPipeline", 8),
        ("sana", "SanaPipeline", 32),
    ],
)
def test_a_pipeline_draws_what_generate_draws(
    root: Path, language_model: LanguageModel, family: str, kind: str, side: int
) -> None:
    denoiser = load_denoiser(root, family)
    bridge = make_bridge(replace(tsc_config(), pooled_width=POOLED_WIDTH if family == "sdxl" else None))
    expected = ours(language_model, bridge, denoiser, resolution=side)
    assert not close(expected, ours(language_model, bridge, denoiser, resolution=side, prompts=PROMPTS[::-1]))
    pipeline = pipeline_of(denoiser, kind)
    settings: dict[str, Any] = {"latents": noise(denoiser, side), "height": side, "width": side}
    if family in ("pixart", "sana"):
        settings["use_resolution_binning"] = False
    negative = ours(language_model, bridge, denoiser, resolution=side, negative="small")
    assert not close(expected, negative)
    with attach(pipeline, language_model=language_model, bridge=bridge) as attached:
        assert close(expected, theirs(pipeline, attached.encode(PROMPTS), **settings))
        assert close(negative, theirs(pipeline, attached.encode(PROMPTS, "small"), **settings))
