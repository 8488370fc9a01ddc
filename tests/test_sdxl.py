"""SDXL: what diffusers' pipeline makes of the same text, pooled text and sizes; gradients to the text alone."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from tests.tiny_denoisers import (
    POOLED_WIDTH,
    check_gradients,
    denoised,
    make_sdxl,
    own_scheduler,
    random_conditioning,
    random_latents,
)
from training.bridge import Conditioning
from training.denoisers import Denoiser, DenoiserConfig
from training.denoisers.sdxl import SDXL


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> Denoiser:
    return DenoiserConfig(model=str(make_sdxl(tmp_path_factory.mktemp("sdxl")))).load()


def test_it_is_what_the_pipeline_does(denoiser: Denoiser) -> None:
    assert isinstance(denoiser, SDXL) and (denoiser.width, denoiser.pooled_width) == (16, POOLED_WIDTH)
    pipeline = StableDiffusionXLPipeline(
        vae=denoiser.vae, unet=denoiser.network, scheduler=own_scheduler(denoiser), text_encoder=None,
        text_encoder_2=None, tokenizer=None, tokenizer_2=None, add_watermarker=False,
    )  # fmt: skip
    latents, given = random_latents(denoiser), random_conditioning(denoiser)
    tokens, pooled = given.tokens.detach(), given.pooled.detach()
    for original, crop in (((8, 8), (0, 0)), ((31, 1001), (5, 2))):
        expected = pipeline(
            prompt_embeds=tokens, pooled_prompt_embeds=pooled, latents=latents, height=8, width=8, guidance_scale=1.0,
            num_inference_steps=3, output_type="latent", original_size=original, crops_coords_top_left=crop,
        )  # fmt: skip
        told = torch.tensor([[*original, *crop, 8.0, 8.0]]).expand(2, -1)
        found = denoised(denoiser, latents, Conditioning(tokens, None, pooled), told)
        assert torch.equal(found, expected.images)
    assert not torch.equal(found, denoised(denoiser, latents, Conditioning(tokens, None, pooled)))


def test_without_sizes_pictures_are_whole(denoiser: Denoiser) -> None:
    latents, given, times = random_latents(denoiser), random_conditioning(denoiser), torch.tensor([3, 700])
    whole = torch.tensor([[8.0, 8, 0, 0, 8, 8]]).expand(2, -1)
    assert torch.equal(denoiser.predict(latents, times, given), denoiser.predict(latents, times, given, whole))


def test_sizes_are_told_in_full_to_a_cast_network(denoiser: Denoiser) -> None:
    """1001 and 1000 are one number in bfloat16."""
    half = DenoiserConfig(model=denoiser.config.model, dtype="bfloat16").load()
    given, times = random_conditioning(half), torch.tensor([3, 700])
    one, other = (
        half.predict(random_latents(half), times, given, torch.tensor([[height, 1000.0, 0, 0, 8, 8]]).expand(2, -1))
        for height in (1001, 1000)
    )
    assert one.dtype == torch.bfloat16 and not torch.equal(one, other)


def test_gradients_reach_what_may_be_seen(denoiser: Denoiser) -> None:
    check_gradients(denoiser)


def test_it_wants_pooled_text(denoiser: Denoiser) -> None:
    with pytest.raises(ValueError, match=rf"wants pooled text: set connector.pooled_width to {POOLED_WIDTH}$"):
        denoiser.predict(random_latents(denoiser), torch.tensor([1, 1]), Conditioning(torch.zeros(2, 3, 16), None))
