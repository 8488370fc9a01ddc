"""SD 1.x and 2.x: what diffusers' pipeline makes of the same text, and gradients to that text alone."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from diffusers import StableDiffusionPipeline

from tests.tiny_denoisers import (
    check_gradients,
    denoised,
    make_unet,
    own_scheduler,
    random_conditioning,
    random_latents,
)
from training.bridge import Conditioning
from training.denoisers import DenoiserConfig
from training.denoisers.unet import UNet


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_it_is_what_the_pipeline_does(kind: Literal["epsilon", "v_prediction"], tmp_path: Path) -> None:
    denoiser = DenoiserConfig(model=str(make_unet(tmp_path, prediction_type=kind))).load()
    assert isinstance(denoiser, UNet) and (denoiser.width, denoiser.pooled_width) == (16, None)
    assert denoiser.prediction_type == kind
    pipeline = StableDiffusionPipeline(
        vae=denoiser.vae, unet=denoiser.network, scheduler=own_scheduler(denoiser), text_encoder=None, tokenizer=None,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    latents, tokens = random_latents(denoiser), random_conditioning(denoiser).tokens.detach()
    expected = pipeline(
        prompt_embeds=tokens, latents=latents, height=8, width=8, guidance_scale=1.0, num_inference_steps=3,
        output_type="latent",
    )  # fmt: skip
    assert torch.equal(denoised(denoiser, latents, Conditioning(tokens, None)), expected.images)


def test_gradients_reach_what_may_be_seen(tmp_path: Path) -> None:
    check_gradients(DenoiserConfig(model=str(make_unet(tmp_path))).load())
