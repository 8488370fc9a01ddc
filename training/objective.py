"""The maths of one training step, as pure functions: randomness by position, timesteps, noise, targets, loss.

Nothing here knows of ranks, batches already seen or torch's global generator. What is drawn for the sample at a
position depends on (seed, phase, position, purpose) alone, so neither the number of processes nor a restart can
change it.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from .configuration import TimestepConfig

BINS = 10
"""Timestep bins in which the loss is told: bin 0 is the least noise."""


def rng(seed: int, phase: int, position: int, purpose: str) -> np.random.Generator:
    """The generator of one position for one purpose: Philox (Salmon et al. 2011), a counter and not a history.

    (seed, phase, purpose) make the key and the position the counter's highest word, so streams cannot overlap.
    """
    key = hashlib.blake2b(f"{seed}/{phase}/{purpose}".encode(), digest_size=16).digest()
    counter = np.array([0, 0, 0, position], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=np.frombuffer(key, dtype="<u8").astype(np.uint64), counter=counter))


def noise_at(seed: int, phase: int, position: int, shape: tuple[int, ...], purpose: str = "noise") -> np.ndarray:
    """Standard normal float32 noise of one position."""
    return rng(seed, phase, position, purpose).standard_normal(shape, dtype=np.float32)


def timesteps_at(config: TimestepConfig, seed: int, phase: int, start: int, batch: int, steps: int) -> np.ndarray:
    """Timesteps of the global batch that starts at position `start`: int64 (batch,) in [0, steps).

    Stratified: each of `batch` equal slices of the distribution gives one timestep, in random order, which lowers the
    variance of the loss (as the low-discrepancy sampler of Kingma et al. 2021, appendix I.1).
    """
    draw = rng(seed, phase, start, "timesteps")
    levels = (draw.permutation(batch) + draw.random(batch)) / batch
    if config.kind == "high_noise" and config.share > 0:
        high = config.floor + (1 - config.floor) * levels / config.share
        low = (levels - config.share) / (1 - config.share)
        levels = np.where(levels < config.share, high, low)
    return np.minimum((levels * steps).astype(np.int64), steps - 1)


def add_noise(
    latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, alphas: torch.Tensor
) -> torch.Tensor:
    """q(x_t | x_0): sqrt(a) x_0 + sqrt(1 - a) noise (Ho et al. 2020, eq. 4); shapes (B, C, h, w), timesteps (B,)."""
    signal, deviation = _levels(timesteps, alphas)
    return signal * latents.float() + deviation * noise.float()


def target_of(
    prediction_type: str, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, alphas: torch.Tensor
) -> torch.Tensor:
    """What the denoiser is to predict: the noise (Ho et al. 2020, eq. 14) or v (Salimans & Ho 2022, appendix D)."""
    match prediction_type:
        case "epsilon":
            return noise.float()
        case "v_prediction":
            signal, deviation = _levels(timesteps, alphas)
            return signal * noise.float() - deviation * latents.float()
    raise ValueError(f"prediction type {prediction_type!r} is not known: use 'epsilon' or 'v_prediction'")


def _levels(timesteps: torch.Tensor, alphas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    alpha = alphas[timesteps].float()[:, None, None, None]
    return alpha.sqrt(), (1 - alpha).sqrt()


def sample_losses(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each sample, in float32: (B, C, h, w) twice -> (B,)."""
    return (predicted.float() - target.float()).square().flatten(1).mean(1)


def min_snr_weights(gamma: float, prediction_type: str, timesteps: torch.Tensor, alphas: torch.Tensor) -> torch.Tensor:
    """Min-SNR loss weights (Hang et al. 2023, sec. 3.4): min(SNR, gamma) over SNR for epsilon, over SNR + 1 for v."""
    alpha = alphas[timesteps].double()
    ratio = alpha / (1 - alpha)
    if prediction_type == "v_prediction":
        return (ratio.clamp(max=gamma) / (ratio + 1)).float()
    return torch.where(ratio > 0, ratio.clamp(max=gamma) / ratio, torch.ones_like(ratio)).float()


def binned(values: torch.Tensor, weights: torch.Tensor, timesteps: torch.Tensor, steps: int) -> torch.Tensor:
    """Sums by timestep bin, float64 (2, BINS): weights x values, and weights; inputs (B,)."""
    bins = (timesteps * BINS // steps).clamp(0, BINS - 1)
    out = torch.zeros(2, BINS, dtype=torch.float64, device=values.device)
    out[0].index_add_(0, bins, (values * weights).double())
    out[1].index_add_(0, bins, weights.double())
    return out
