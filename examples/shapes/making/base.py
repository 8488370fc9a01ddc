"""Trains the base: a Stable Diffusion of 3 million parameters that draws one object in full and binds several wrongly.

The recipe was found by experiment. Places are decided at high noise only, so training starts with 70 % of its timesteps
in [700, 1000); the first group of `conv_in` is a constant, which the zero padding turns into a sense of place; the text
encoder is the tiny CLIP's and learns along; v-prediction with zero terminal SNR and plain loss (min-SNR weighs down just
the steps that decide). Then both resolutions, 16 and 24 pixels, take turns.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch.nn.functional import mse_loss
from transformers import CLIPTextModel, CLIPTokenizer

from ..words import base_caption
from ..world import draw_scenes, render
from .clip import WIDTH, normalised
from .training import WeightAverage, train
from .vae import CHANNELS, PatchCodec

POOL, BATCH = 40_000, 64


def make_base(folder: Path, clip_folder: Path, *, first_steps: int = 2000, second_steps: int = 6500) -> None:
    """Trains U-Net and text encoder in two legs and saves them, with tokenizer and scheduler, into `folder`."""
    torch.manual_seed(5)
    rng = np.random.default_rng(5)
    codec = PatchCodec()
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder)
    text_encoder = CLIPTextModel.from_pretrained(clip_folder, dtype=torch.float32).train()
    unet, scheduler = _unet(), make_scheduler()
    scenes = draw_scenes(rng, POOL, (0.6, 0.25, 0.1, 0.05))
    captions = np.array([[base_caption(scenes.facts(n), rng) for _ in range(3)] for n in range(POOL)])
    average = WeightAverage([unet, text_encoder])

    def loss_for(side: int, high: float, floor: int) -> torch.Tensor:
        rows = rng.integers(POOL, size=BATCH)
        texts = np.where(rng.random(BATCH) < 0.1, "", captions[rows, rng.integers(3, size=BATCH)])
        text = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        latents = codec.encode(normalised(render(scenes[rows], side)))
        noise = torch.randn_like(latents)
        lowest = np.where(rng.random(BATCH) < high, floor, 0)
        times = torch.from_numpy(rng.integers(lowest, 1000))
        noisy = scheduler.add_noise(latents, noise, times)
        hidden = text_encoder(**text).last_hidden_state
        predicted = unet(noisy, times, hidden, encoder_attention_mask=text.attention_mask).sample
        return mse_loss(predicted, scheduler.get_velocity(latents, noise, times))

    parts = [unet, text_encoder]
    train(parts, lambda _: loss_for(16, 0.7, 700), name="base/1", steps=first_steps, rate=1.2e-3, decay_from=0.6,
          after_step=average.update)  # fmt: skip
    average.swap()
    save_base(folder, tokenizer, text_encoder, unet)
    train(parts, lambda s: loss_for(24 if s % 5 > 2 else 16, 0.35, 600), name="base/2", steps=second_steps, rate=1.2e-3,
          decay_from=0.4, after_step=average.update)  # fmt: skip
    average.swap()
    save_base(folder, tokenizer, text_encoder, unet)


def save_base(folder: Path, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
    """Writes tokenizer, text encoder, U-Net and scheduler in the layout of a diffusers pipeline folder."""
    tokenizer.save_pretrained(folder / "tokenizer")
    text_encoder.save_pretrained(folder / "text_encoder")
    unet.save_pretrained(folder / "unet")
    make_scheduler().save_pretrained(folder / "scheduler")


def assemble_base(folder: Path, trained: Path, vae_folder: Path) -> None:
    """One `StableDiffusionPipeline` folder in fp16 from the trained parts and the VAE."""
    half = torch.float16
    StableDiffusionPipeline(
        vae=AutoencoderTiny.from_pretrained(vae_folder, torch_dtype=half),
        text_encoder=CLIPTextModel.from_pretrained(trained / "text_encoder", dtype=half),
        tokenizer=CLIPTokenizer.from_pretrained(trained / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(trained / "unet", torch_dtype=half),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def make_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise, rescaled to zero terminal SNR, for v-prediction."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        set_alpha_to_one=False,
        clip_sample=False,
        steps_offset=1,
    )


def _unet() -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        sample_size=6,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(64, 96),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=8,
        cross_attention_dim=WIDTH,
    )
    with torch.no_grad():
        unet.conv_in.weight[:8] = 0
        unet.conv_in.bias[:8] = torch.tensor([2.0, -2, 2, -2, 1, -1, 1, -1])
    return unet
