"""The maths of one training step, as pure functions: randomness by position, timesteps, noise, targets, loss.

Nothing here knows of ranks, batches already seen or torch's global generator. What is drawn for the sample at a
position depends on (seed, phase, position, purpose) alone, so neither the number of processes nor a restart can
change it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from .configuration import TimestepConfig, Weighting

BINS = 10
"""Timestep bins in which the loss is told: bin 0 is the least noise."""
LOWEST_SNR = 4e-5
"""What a signal-to-noise ratio that losses of epsilon are weighed by is at least: that of the last level of DDPM's betas, with
which the debiased weight was found, 158. Where the schedule ends in noise alone it would be infinite."""


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


def noises_at(seed: int, phase: int, position: int, shape: tuple[int, ...], count: int) -> np.ndarray:
    """`count` noises of one position, (count, *shape): the first is that of `noise_at`, however many there are."""
    purposes = ("noise", *(f"noise {number}" for number in range(1, count)))
    return np.stack([noise_at(seed, phase, position, shape, purpose) for purpose in purposes])


def timesteps_at(
    config: TimestepConfig, seed: int, phase: int, start: int, batch: int, steps: int, per_sample: int = 1
) -> np.ndarray:
    """Timesteps of the global batch that starts at position `start`: int64 (batch, per_sample) in [0, steps).

    Stratified: each of the batch x per_sample equal slices of the distribution gives one timestep, in random order, which
    lowers the variance of the loss (as the low-discrepancy sampler of Kingma et al. 2021, appendix I.1). Those of one sample
    come one from each `per_sample`-th of the distribution.
    """
    draw = rng(seed, phase, start, "timesteps")
    slices = np.stack([part * batch + draw.permutation(batch) for part in range(per_sample)], axis=1)
    levels = (slices + draw.random((batch, per_sample))) / (batch * per_sample)
    return np.minimum((_quantiles(config, levels) * steps).astype(np.int64), steps - 1)


def _quantiles(config: TimestepConfig, levels: np.ndarray) -> np.ndarray:
    """The distribution's inverse, [0, 1) -> [0, 1]: what share of the noise levels lies below such a share of the draws."""
    match config.kind:
        case "high_noise" if config.share > 0:
            high = config.floor + (1 - config.floor) * levels / config.share
            low = (levels - config.share) / (1 - config.share)
            return np.where(levels < config.share, high, low)
        case "logit_normal":
            normal = torch.special.ndtri(torch.from_numpy(levels))
            return torch.sigmoid(config.mean + config.deviation * normal).numpy()
        case _:
            return levels


@dataclass(frozen=True, kw_only=True)
class NoiseLevels:
    """The T noise levels of a denoiser, from little to much noise: x_t = signal x_0 + deviation noise."""

    kind: Literal["epsilon", "v_prediction", "flow_prediction"]
    """What the denoiser predicts."""
    signal: torch.Tensor
    """float32 (T,)"""
    deviation: torch.Tensor
    """float32 (T,)"""
    times: torch.Tensor
    """float32 (T,), what denoiser and connector are told: the level's number in diffusion, T x deviation in flows."""

    def to(self, device: torch.device | str) -> NoiseLevels:
        """The same levels there."""
        return replace(
            self, signal=self.signal.to(device), deviation=self.deviation.to(device), times=self.times.to(device)
        )

    def __len__(self) -> int:
        return len(self.signal)


def add_noise(latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, levels: NoiseLevels) -> torch.Tensor:
    """x_t of x_0 (Ho et al. 2020, eq. 4; Lipman et al. 2023, eq. 22 for flows); shapes (B, C, h, w), timesteps int64 (B,)."""
    signal, deviation = _at(timesteps, levels)
    return signal * latents.float() + deviation * noise.float()


def target_of(latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, levels: NoiseLevels) -> torch.Tensor:
    """What the denoiser is to predict: the noise (Ho et al. 2020, eq. 14), v (Salimans & Ho 2022, appendix D), or the velocity
    from data to noise (Lipman et al. 2023, eq. 23).
    """
    signal, deviation = _at(timesteps, levels)
    match levels.kind:
        case "epsilon":
            return noise.float()
        case "v_prediction":
            return signal * noise.float() - deviation * latents.float()
        case "flow_prediction":
            return noise.float() - latents.float()


def _at(timesteps: torch.Tensor, levels: NoiseLevels) -> tuple[torch.Tensor, torch.Tensor]:
    return levels.signal[timesteps][:, None, None, None], levels.deviation[timesteps][:, None, None, None]


def sample_losses(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each sample, in float32: (B, C, h, w) twice -> (B,)."""
    return (predicted.float() - target.float()).square().flatten(1).mean(1)


def loss_weights(weighting: Weighting, gamma: float, timesteps: torch.Tensor, levels: NoiseLevels) -> torch.Tensor:
    """How much the losses at these timesteps count: int64 (B,) -> float32 (B,).

    As weights of the squared error of x_0 they are min(SNR, gamma) for min-SNR (Hang et al. 2023, arXiv 2303.09556, section
    3.4), and sqrt(SNR) for debiased, which is 1 / sqrt(SNR) of that of epsilon (Yu et al. 2023, arXiv 2310.08442). That error is
    the error of epsilon over SNR, and the error of v over SNR + 1. For flows neither paper has a weight.
    """
    if weighting == "plain":
        return torch.ones_like(timesteps, dtype=torch.float32)
    ratio = (levels.signal[timesteps].double() / levels.deviation[timesteps].double()).square()
    if levels.kind == "epsilon":
        ratio = ratio.clamp(min=LOWEST_SNR)
    of_picture = ratio.clamp(max=gamma) if weighting == "min_snr" else ratio.sqrt()
    return (of_picture / (ratio + 1 if levels.kind == "v_prediction" else ratio)).float()


def binned(values: torch.Tensor, weights: torch.Tensor, timesteps: torch.Tensor, steps: int) -> torch.Tensor:
    """Sums by timestep bin, float64 (2, BINS): weights x values, and weights; inputs (B,)."""
    bins = (timesteps * BINS // steps).clamp(0, BINS - 1)
    out = torch.zeros(2, BINS, dtype=torch.float64, device=values.device)
    out[0].index_add_(0, bins, (values * weights).double())
    out[1].index_add_(0, bins, weights.double())
    return out
