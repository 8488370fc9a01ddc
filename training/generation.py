"""Images from prompts: the frozen language model and a connector drive the frozen denoiser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .bridge import Bridge, Conditioning
from .configuration import check_connector
from .denoisers import Denoiser
from .language_models import LanguageModel
from .objective import noise_at


@torch.inference_mode()
def generate(
    *,
    language_model: LanguageModel,
    bridge: Bridge | None,
    denoiser: Denoiser,
    beside: LanguageModel | None = None,
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
    if bridge is not None:
        check_connector(bridge.config, language_model.config)
    elif language_model.width != denoiser.width:
        raise ValueError(
            f"without a connector the denoiser wants text of width {denoiser.width}, the language model gives "
            f"{language_model.width}: use its own text encoder"
        )
    shape = denoiser.latent_shape(resolution)
    language_model.to(denoiser.device)
    if bridge is not None:
        bridge.to(denoiser.device)
    if beside is not None:
        beside.to(denoiser.device)
    out = np.zeros((len(prompts), resolution, resolution, 3), dtype=np.uint8)
    for first in range(0, len(prompts), batch):
        part = slice(first, first + batch)
        noise = torch.from_numpy(np.stack([start_noise(seed, shape) for seed in seeds[part]]))
        latents = _denoise(language_model, bridge, denoiser, beside, list(prompts[part]), noise, steps, guidance)
        pixels = denoiser.decode(latents).permute(0, 2, 3, 1)
        out[part] = ((pixels + 1) * 127.5).round().to(torch.uint8).cpu().numpy()
    return out


def start_noise(seed: int, shape: tuple[int, int, int]) -> np.ndarray:
    """The noise that the image of a seed starts from: float32 (C, h, w)."""
    return noise_at(seed, 0, 0, shape, "generate")


def _denoise(
    language_model: LanguageModel,
    bridge: Bridge | None,
    denoiser: Denoiser,
    beside: LanguageModel | None,
    prompts: list[str],
    noise: torch.Tensor,
    steps: int,
    guidance: float,
) -> torch.Tensor:
    """Latents (B, C, h, w) of prompts from noise of the same shape."""
    device, count, guided = denoiser.device, len(prompts), guidance != 1
    texts = [*prompts, ""] if guided else prompts
    # The empty prompt is encoded once, and stands beside every prompt.
    which = torch.tensor([*range(count), *[count] * count] if guided else range(count), device=device)
    hidden, mask = language_model.encode(language_model.tokenize(texts), appended=bridge.appended if bridge else None)
    other = None if beside is None else Conditioning(*(x[which] for x in beside.encode(beside.tokenize(texts))))
    text, mask = (bridge.read(hidden, mask) if bridge else hidden)[which], mask[which]
    scheduler = scheduler_of(denoiser)
    scheduler.set_timesteps(steps, device=device)
    latents = noise.to(device) * scheduler.init_noise_sigma
    for step in scheduler.timesteps:
        noisy = scheduler.scale_model_input(torch.cat([latents, latents]) if guided else latents, step)
        times = step.expand(len(noisy))
        conditioning = Conditioning(text, mask) if bridge is None else bridge.at(text, mask, times, other)
        predicted = denoiser.predict(noisy, times, conditioning).float()
        if guided:
            with_text, without = predicted.chunk(2)
            predicted = without + guidance * (with_text - without)
        latents = scheduler.step(predicted, step, latents).prev_sample
    return latents


def scheduler_of(denoiser: Denoiser) -> Any:
    """DDIM (Song et al. 2021) over the denoiser's noise levels; for a flow the Euler steps that it was made for."""
    import diffusers

    if denoiser.prediction_type == "flow_prediction":
        shift = denoiser.scheduler.get("flow_shift") or denoiser.scheduler.get("shift") or 1.0
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    return diffusers.DDIMScheduler.from_config(denoiser.scheduler)
