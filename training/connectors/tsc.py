"""ELLA's Timestep-Aware Semantic Connector (Hu et al. 2024, arXiv 2403.05135), with the layout of the released weights.

A perceiver resampler: a few learned latents ask the text at every block, and each layer norm is shifted and scaled by
the timestep. At the defaults its 93 tensors and 66,820,608 parameters carry the names and shapes of
`ella-sd1.5-tsc-t5xl.safetensors`, so weights go either way without conversion.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from .configuration import TSCConfig


def sinusoid(timestep: torch.Tensor, channels: int) -> torch.Tensor:
    """Timestep features (Vaswani et al. 2017), cosines first: (B,) -> float32 (B, channels)."""
    half = channels // 2
    exponents = -math.log(10_000) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half
    angles = timestep.float()[:, None] * exponents.exp()
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """Linear-SiLU-Linear on the sinusoid: (B, time_channels) -> (B, time_width)."""

    def __init__(self, config: TSCConfig) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(config.time_channels, config.time_width)
        self.linear_2 = nn.Linear(config.time_width, config.time_width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.silu(self.linear_1(features)))


class AdaLN(nn.Module):
    """Layer norm with shift and scale from the timestep; plain at the start, without the gate of AdaLN-Zero."""

    def __init__(self, config: TSCConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.time_width, 2 * config.width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        shift, scale = self.linear(F.silu(time))[:, None].chunk(2, dim=-1)
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class FeedForward(nn.Module):
    """Linear, squared ReLU, Linear, four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())


class PerceiverBlock(nn.Module):
    """Latents attend to themselves and to the text; the text is never updated."""

    def __init__(self, config: TSCConfig) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(config.width, config.heads, batch_first=True)
        self.mlp = FeedForward(config.width)
        self.ln_1 = AdaLN(config)
        self.ln_2 = AdaLN(config)
        self.ln_ff = AdaLN(config)

    def forward(
        self, latents: torch.Tensor, text: torch.Tensor, time: torch.Tensor, hidden_keys: torch.Tensor | None
    ) -> torch.Tensor:
        asking = self.ln_1(latents, time)
        asked = torch.cat([asking, self.ln_2(text, time)], dim=1)  # latents first, as released
        latents = latents + self.attn(asking, asked, asked, key_padding_mask=hidden_keys, need_weights=False)[0]
        return latents + self.mlp(self.ln_ff(latents, time))


class Resampler(nn.Module):
    """The perceiver inside the TSC: text (B, L, in_width), time (B, time_width) -> (B, queries, width)."""

    def __init__(self, config: TSCConfig) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(config.queries, config.width) * config.width**-0.5)
        self.time_aware_linear = nn.Linear(config.time_width, config.width)
        self.proj_in = nn.Linear(config.in_width, config.width)
        self.perceiver_blocks = nn.ModuleList([PerceiverBlock(config) for _ in range(config.blocks)])

    def forward(self, text: torch.Tensor, time: torch.Tensor, hidden_keys: torch.Tensor | None) -> torch.Tensor:
        latents = self.latents[None] + self.time_aware_linear(F.silu(time))[:, None]
        text = self.proj_in(text)
        for block in self.perceiver_blocks:
            latents = block(latents, text, time, hidden_keys)
        return latents


class TSC(nn.Module):
    """The connector. Its state dict has the key names of the released weights."""

    def __init__(self, config: TSCConfig) -> None:
        super().__init__()
        self.config = config
        self.time_embedding = TimeEmbedding(config)
        self.connector = Resampler(config)

    def forward(
        self, hidden: torch.Tensor, mask: torch.Tensor, timestep: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden (B, L, in_width), mask (B, L) bool, timestep (B,) -> tokens (B, queries, width), None."""
        dtype = self.connector.latents.dtype
        hidden_keys = None
        if self.config.use_mask == "mask":
            hidden_keys = torch.cat([mask.new_zeros(len(mask), self.config.queries), ~mask], dim=1)
        time = self.time_embedding(sinusoid(timestep, self.config.time_channels).to(dtype))
        return self.connector(hidden.to(dtype), time, hidden_keys), None
