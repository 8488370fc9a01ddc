"""Images from prompts: the frozen language model and a connector drive the frozen denoiser."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

from .bridge import Bridge, Conditioning
from .configuration import Sampler, check_connector
from .denoisers import Denoiser
from .language_models import LanguageModel
from .objective import noise_at
from .samplers import scheduler_of, set_steps, step_settings

Conditioner = Callable[[torch.Tensor], Conditioning]
"""Times (B,) -> what the denoiser is told then."""


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
    sampler: Sampler = "auto",
    negative: str = "",
    image: np.ndarray | None = None,
    strength: float = 0.8,
    offload: bool = False,
) -> np.ndarray:
    """One image a prompt: uint8 (N, resolution, resolution, 3).

    An image depends on its prompt and seed alone, not on what else is in the batch, and different connectors given one
    seed start from the same noise. The connector runs at every step, as its tokens depend on the timestep; the language
    model, and what of the connector does not depend on it, once. Guidance (Ho & Salimans 2022) is against the prompt
    `negative`, which takes the same path as any prompt; 1 turns it off.
    `image`, uint8 (resolution, resolution, 3), is where all start from (SDEdit, Meng et al. 2022): `strength`, in (0, 1], is the
    share of the steps that are taken; where that is all of them, they start from noise alone and nothing of it is left.
    All runs where the denoiser is: the other models are moved there; with `offload` the text models are there only while
    they read a batch of prompts. Without a connector it must be the denoiser's own text encoder.
    Raises ValueError in one line for what cannot work.
    """
    _check(language_model, bridge, denoiser, prompts, steps, guidance, seeds, batch, strength)
    shape = denoiser.latent_shape(resolution)
    if image is not None and image.shape != (resolution, resolution, 3):
        raise ValueError(f"the image to start from has shape {image.shape}: make it ({resolution}, {resolution}, 3)")
    if bridge is not None:
        with torch.inference_mode(False):  # weights moved in inference mode could not be trained afterwards
            bridge.to(denoiser.device)
    start = None if image is None else _latents_of(image, denoiser)
    out = np.zeros((len(prompts), resolution, resolution, 3), dtype=np.uint8)
    for first in range(0, len(prompts), batch):
        part = slice(first, first + batch)
        # The negative prompt is encoded once, and stands beside every prompt.
        texts = [*prompts[part], negative] if guidance != 1 else list(prompts[part])
        with on_device((language_model, beside), denoiser.device, offload):
            told = _conditioner(language_model, bridge, beside, texts, count=len(prompts[part]))
        noise = torch.from_numpy(np.stack([start_noise(seed, shape) for seed in seeds[part]])).to(denoiser.device)
        scheduler = scheduler_of(denoiser, sampler)
        latents, timesteps = _begin(scheduler, steps, noise, start, strength)
        latents = _denoise(denoiser, told, scheduler, timesteps, latents, guidance, step_settings(sampler, seeds[part]))
        pixels = denoiser.decode(latents).permute(0, 2, 3, 1)
        out[part] = ((pixels + 1) * 127.5).round().to(torch.uint8).cpu().numpy()
    return out


def start_noise(seed: int, shape: tuple[int, int, int]) -> np.ndarray:
    """The noise that the image of a seed starts from: float32 (C, h, w)."""
    return noise_at(seed, 0, 0, shape, "generate")


def _check(
    language_model: LanguageModel,
    bridge: Bridge | None,
    denoiser: Denoiser,
    prompts: Sequence[str],
    steps: int,
    guidance: float,
    seeds: Sequence[int],
    batch: int,
    strength: float,
) -> None:
    """Raises ValueError in one line for what cannot work."""
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds: give one seed for each prompt")
    if batch < 1 or not 1 <= steps <= denoiser.steps:
        raise ValueError(
            f"batch is {batch} and steps {steps}: batch must be at least 1, steps from 1 to {denoiser.steps}"
        )
    if not 0 <= guidance < math.inf:
        raise ValueError(f"guidance is {guidance}: it must be at least 0, and finite; 1 turns it off")
    if not 0 < strength <= 1:
        raise ValueError(f"strength is {strength}: it is a share of the steps, above 0 and at most 1")
    if bridge is not None:
        check_connector(bridge.config, language_model.config)
    elif language_model.width != denoiser.width:
        raise ValueError(
            f"without a connector the denoiser wants text of width {denoiser.width}, the language model gives "
            f"{language_model.width}: use its own text encoder"
        )


@contextmanager
def on_device(models: Sequence[LanguageModel | None], device: torch.device, offload: bool) -> Iterator[None]:
    """Has the text models on the device: inside alone with `offload`, else from now on."""
    with ExitStack() as stack:
        for model in filter(None, models):
            if offload:
                stack.enter_context(model.on(device))
            else:
                model.to(device)
        yield


def _conditioner(
    language_model: LanguageModel,
    bridge: Bridge | None,
    beside: LanguageModel | None,
    texts: list[str],
    count: int,
) -> Conditioner:
    """Reads the texts once: `count` prompts, and behind them, where guidance is wanted, the one that it is against."""
    guided = len(texts) > count
    which = [*range(count), *[count] * count] if guided else list(range(count))
    hidden, mask = language_model.encode(language_model.tokenize(texts), appended=bridge.appended if bridge else None)
    other = None if beside is None else Conditioning(*(x[which] for x in beside.encode(beside.tokenize(texts))))
    if bridge is None:
        plain = Conditioning(hidden[which], mask[which])
        return lambda times: plain
    text, mask = bridge.read(hidden, mask)[which], mask[which]
    return lambda times: bridge.at(text, mask, times, other)


def _latents_of(image: np.ndarray, denoiser: Denoiser) -> torch.Tensor:
    """Latents (1, C, h, w) of an image, uint8 (H, W, 3)."""
    pixels = torch.from_numpy(image.copy()).to(denoiser.device).permute(2, 0, 1)[None]
    return denoiser.encode_images(pixels.float() / 127.5 - 1).float()


def _begin(
    scheduler: Any, steps: int, noise: torch.Tensor, start: torch.Tensor | None, strength: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (B, C, h, w) to begin with, and the timesteps that are left: noise and all of them, or `start` under the noise
    of the step at which the last `strength` of them begin.
    """
    timesteps = set_steps(scheduler, steps, noise.device)
    first = len(timesteps) - max(1, int(len(timesteps) * strength))
    # Most schedules' first noise lets through what it lies on: 7 % of the amplitude with Stable Diffusion's.
    if start is None or first == 0:
        return noise * getattr(scheduler, "init_noise_sigma", 1.0), timesteps  # a flow's has none
    timesteps = timesteps[first:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    start, at = start.expand_as(noise), timesteps[:1].expand(len(noise))
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(start, at, noise), timesteps
    return scheduler.add_noise(start, noise, at), timesteps


def _denoise(
    denoiser: Denoiser,
    told: Conditioner,
    scheduler: Any,
    timesteps: torch.Tensor,
    latents: torch.Tensor,
    guidance: float,
    settings: dict[str, Any],
) -> torch.Tensor:
    """Latents (B, C, h, w) without their noise."""
    guided = guidance != 1
    for step in timesteps:
        noisy = torch.cat([latents, latents]) if guided else latents
        if hasattr(scheduler, "scale_model_input"):
            noisy = scheduler.scale_model_input(noisy, step)
        times = step.expand(len(noisy))
        predicted = denoiser.predict(noisy, times, told(times)).float()
        if guided:
            with_text, without = predicted.chunk(2)
            predicted = without + guidance * (with_text - without)
        latents = scheduler.step(predicted, step, latents, **settings).prev_sample
    return latents
