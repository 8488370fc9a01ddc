"""SANA: what diffusers' pipeline makes of the same text under the same mask, and gradients to that text alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import SanaPipeline

from tests.tiny_denoisers import (
    check_gradients,
    denoised,
    make_sana,
    own_scheduler,
    random_conditioning,
    random_latents,
)
from training.bridge import Conditioning
from training.denoisers import DenoiserConfig
from training.denoisers.sana import Sana


@pytest.mark.parametrize("timestep_scale", [1.0, 0.001])
def test_it_is_what_the_pipeline_does(timestep_scale: float, tmp_path: Path) -> None:
    denoiser = DenoiserConfig(model=str(make_sana(tmp_path))).load()
    denoiser.network.register_to_config(timestep_scale=timestep_scale)
    assert isinstance(denoiser, Sana) and (denoiser.width, denoiser.prediction_type) == (16, "flow_prediction")
    pipeline = SanaPipeline(
        vae=denoiser.vae, transformer=denoiser.network, scheduler=own_scheduler(denoiser), text_encoder=None,
        tokenizer=None,
    )  # fmt: skip
    latents, given = random_latents(denoiser), random_conditioning(denoiser)
    tokens, mask = given.tokens.detach(), given.mask
    expected = pipeline(
        prompt_embeds=tokens, prompt_attention_mask=mask, negative_prompt=None, latents=latents, height=32, width=32,
        guidance_scale=1.0, num_inference_steps=3, output_type="latent", use_resolution_binning=False,
    )  # fmt: skip
    assert torch.equal(denoised(denoiser, latents, Conditioning(tokens, mask)), expected.images)


def test_gradients_reach_what_may_be_seen(tmp_path: Path) -> None:
    check_gradients(DenoiserConfig(model=str(make_sana(tmp_path))).load())


def test_latents_are_scaled_and_not_drawn(tmp_path: Path) -> None:
    denoiser = DenoiserConfig(model=str(make_sana(tmp_path))).load()
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    raw = denoiser.vae.encode(pixels).latent
    latents = denoiser.encode_images(pixels, torch.ones(2, 8, 4, 4))
    assert torch.equal(latents, raw * 0.41407) and latents.shape[1:] == denoiser.latent_shape(8) == (8, 4, 4)
    assert torch.equal(denoiser.draw_stored(raw, None), latents)
    assert torch.allclose(denoiser.decode(latents), denoiser.vae.decode(raw).sample.clamp(-1, 1), atol=1e-5)
