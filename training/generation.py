"""Images from prompts: the frozen language model and a connector drive the frozen denoiser."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from .configuration import check_padding
from .denoisers import Denoiser
from .language_models import LanguageModel
from .objective import noise_at


@torch.inference_mode()
def generate(
    *,
    language_model: LanguageModel,
    connector: nn.Module | None,
    denoiser: Denoiser,
    prompts: Sequence[str],
    resolution: int,
    steps: int,
    guidance: float,
    seeds: Sequence[int],
    batch: int,
) -> np.ndarray:
    """One image a prompt: uint8 (N, resolution, resolution, 3), by DDIM (Song et al. 2021) without added noise.

    An image depends on its prompt and seed alone, not on what else is in the batch, and different connectors given one
    seed start from the same noise. The connector runs at every step, as its tokens depend on the timestep. Guidance
    (Ho & Salimans 2022) is against the empty prompt, which takes the same path as any prompt; 1 turns it off.
    All runs where the denoiser is: the other models are moved there.
    Without a connector the language model must be the denoiser's own text encoder.
    Raises ValueError in one line for what cannot work.
    """
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds: give one seed for each prompt")
    if batch < 1 or not 1 <= steps <= denoiser.steps:
        raise ValueError(
            f"batch is {batch} and steps {steps}: batch must be at least 1, steps from 1 to {denoiser.steps}"
        )
    if connector is not None:
        check_padding(connector.config, language_model.config)  # type: ignore[arg-type]
    elif language_model.width != denoiser.width:
        raise ValueError(
            f"without a connector the U-Net wants text of width {denoiser.width}, the language model gives "
            f"{language_model.width}: use its own text encoder"
        )
    shape = denoiser.latent_shape(resolution)
    language_model.to(denoiser.device)
    if connector is not None:
        connector.to(denoiser.device)
    out = np.zeros((len(prompts), resolution, resolution, 3), dtype=np.uint8)
    for first in range(0, len(prompts), batch):
        part = slice(first, first + batch)
        noise = torch.from_numpy(np.stack([start_noise(seed, shape) for seed in seeds[part]]))
        latents = _denoise(language_model, connector, denoiser, list(prompts[part]), noise, steps, guidance)
        pixels = denoiser.decode(latents).permute(0, 2, 3, 1)
        out[part] = ((pixels + 1) * 127.5).round().to(torch.uint8).cpu().numpy()
    return out


def start_noise(seed: int, shape: tuple[int, int, int]) -> np.ndarray:
    """The noise that the image of a seed starts from: float32 (C, h, w)."""
    return noise_at(seed, 0, 0, shape, "generate")


def _denoise(
    language_model: LanguageModel,
    connector: nn.Module | None,
    denoiser: Denoiser,
    prompts: list[str],
    noise: torch.Tensor,
    steps: int,
    guidance: float,
) -> torch.Tensor:
    """Latents (B, C, h, w) of prompts from noise of the same shape."""
    from diffusers import DDIMScheduler

    device, count, guided = denoiser.device, len(prompts), guidance != 1
    hidden, mask = language_model.encode(language_model.tokenize([*prompts, ""] if guided else prompts))
    if guided:  # the empty prompt is encoded once, and stands beside every prompt
        which = torch.tensor([*range(count), *[count] * count], device=hidden.device)
        hidden, mask = hidden[which], mask[which]
    scheduler = DDIMScheduler.from_config(denoiser.scheduler.config)
    scheduler.set_timesteps(steps, device=device)
    latents = noise.to(device) * scheduler.init_noise_sigma
    for step in scheduler.timesteps:
        noisy = torch.cat([latents, latents]) if guided else latents
        times = step.expand(len(noisy))
        tokens, token_mask = (hidden, mask) if connector is None else connector(hidden, mask, times)
        predicted = denoiser.predict(noisy, times, tokens, token_mask).float()
        if guided:
            with_text, without = predicted.chunk(2)
            predicted = without + guidance * (with_text - without)
        latents = scheduler.step(predicted, step, latents).prev_sample
    return latents
