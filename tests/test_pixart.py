"""PixArt: what diffusers' pipelines make of the same text under the same mask, and gradients to that text alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline

from tests.tiny_denoisers import (
    check_gradients,
    denoised,
    make_pixart,
    own_scheduler,
    random_conditioning,
    random_latents,
)
from training.bridge import Conditioning
from training.denoisers import DenoiserConfig
from training.denoisers.pixart import PixArt


@pytest.mark.parametrize("pipeline_class", [PixArtAlphaPipeline, PixArtSigmaPipeline])
def test_it_is_what_the_pipeline_does(pipeline_class: type, tmp_path: Path) -> None:
    """PixArt-alpha's of 1024 pixels is told the size, PixArt-Sigma's is not."""
    folder = make_pixart(tmp_path, additional_conditions=pipeline_class is PixArtAlphaPipeline)
    denoiser = DenoiserConfig(model=str(folder)).load()
    assert isinstance(denoiser, PixArt) and (denoiser.width, denoiser.prediction_type) == (16, "epsilon")
    pipeline = pipeline_class(
        vae=denoiser.vae, transformer=denoiser.network, scheduler=own_scheduler(denoiser), text_encoder=None,
        tokenizer=None,
    )  # fmt: skip
    latents, given = random_latents(denoiser), random_conditioning(denoiser)
    tokens, mask = given.tokens.detach(), given.mask
    expected = pipeline(
        prompt_embeds=tokens, prompt_attention_mask=mask, negative_prompt=None, latents=latents, height=8, width=8,
        guidance_scale=1.0, num_inference_steps=3, output_type="latent", use_resolution_binning=False,
    )  # fmt: skip
    assert torch.equal(denoised(denoiser, latents, Conditioning(tokens, mask)), expected.images)


@pytest.mark.parametrize("additional_conditions", [False, True])
def test_gradients_reach_what_may_be_seen(additional_conditions: bool, tmp_path: Path) -> None:
    check_gradients(
        DenoiserConfig(model=str(make_pixart(tmp_path, additional_conditions=additional_conditions))).load()
    )


def test_an_older_configuration_is_known(tmp_path: Path) -> None:
    """PixArt-alpha's was written before its class had a name of its own; DiT's is of the same class."""
    path = make_pixart(tmp_path) / "transformer" / "config.json"
    said = json.loads(path.read_text()) | {"_class_name": "Transformer2DModel"}
    path.write_text(json.dumps(said))
    check_gradients(DenoiserConfig(model=str(tmp_path)).load())
    path.write_text(json.dumps(said | {"norm_type": "ada_norm_zero"}))
    with pytest.raises(ValueError, match=r"holds a Transformer2DModel, which no file of training/denoisers drives"):
        DenoiserConfig(model=str(tmp_path)).load()


def test_a_side_must_hold_whole_patches(tmp_path: Path) -> None:
    denoiser = DenoiserConfig(model=str(make_pixart(tmp_path))).load()
    assert denoiser.latent_shape(12) == (4, 6, 6)
    with pytest.raises(
        ValueError, match=r"resolution 10 is not a multiple of 4, the VAE's patch of 2 times the network's"
    ):
        denoiser.latent_shape(10)
