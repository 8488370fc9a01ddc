"""ELLA's Timestep-Aware Semantic Connector (Hu et al. 2024, arXiv 2403.05135), with the layout of the released weights.

A perceiver resampler: a few learned latents ask the text at every block, and each layer norm is shifted and scaled by
the timestep. At the defaults its 93 tensors and 66,820,608 parameters carry the names and shapes of
`ella-sd1.5-tsc-t5xl.safetensors`, so weights go either way without conversion. The rows of ELLA's ablation (its table 6) are
settings: gates ("adaln_zero", 73,907,712 parameters), or no timestep at all ("off": 44,159,232; with one block 8,712,192).
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from .configuration import TSCConfig


def sinusoid(timestep: torch.Tensor, channels: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Timestep features (Vaswani et al. 2017), cosines first: (B,) -> (B, channels) in `dtype`."""
    half = channels // 2
    exponents = -math.log(10_000) * torch.arange(half, dtype=dtype, device=timestep.device) / half
    angles = timestep.to(dtype)[:, None] * exponents.exp()
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
    """Layer norm with shift and scale from the timestep, and a gate where it is asked for (Peebles & Xie 2023, section 3.2).
    Zero at the start: a plain layer norm, and with a gate nothing of the layer that follows.
    """

    def __init__(self, config: TSCConfig, *, gated: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(config.time_width, (3 if gated else 2) * config.width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: torch.Tensor, time: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x (B, N, width), time (B, time_width) -> normalised (B, N, width), gate (B, 1, width) or None."""
        assert time is not None
        shift, scale, *gate = self.linear(F.silu(time))[:, None].split(x.shape[-1], dim=-1)
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift, gate[0] if gate else None


class PlainLN(nn.LayerNorm):
    """Layer norm with learned shift and scale, called as AdaLN is."""

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, time: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return super().forward(x), None


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
        # ELLA tells of no gates' places: after attention and after the feed-forward, as DiT, is what its count allows.
        self.ln_1 = _norm(config, gated=True)
        self.ln_2 = _norm(config, gated=False)
        self.ln_ff = _norm(config, gated=True)

    def forward(
        self,
        latents: torch.Tensor,
        text: torch.Tensor,
        time: torch.Tensor | None,
        hidden_keys: torch.Tensor | None,
    ) -> torch.Tensor:
        asking, gate = self.ln_1(latents, time)
        asked = torch.cat([asking, self.ln_2(text, time)[0]], dim=1)  # latents first, as released
        heard = self.attn(asking, asked, asked, key_padding_mask=hidden_keys, need_weights=False)[0]
        latents = latents + (heard if gate is None else gate * heard)
        inner, gate = self.ln_ff(latents, time)
        thought = self.mlp(inner)
        return latents + (thought if gate is None else gate * thought)


def _norm(config: TSCConfig, *, gated: bool) -> AdaLN | PlainLN:
    if config.timestep == "off":
        return PlainLN(config.width, eps=1e-6)
    return AdaLN(config, gated=gated and config.timestep == "adaln_zero")


class Resampler(nn.Module):
    """The perceiver inside the TSC: text (B, L, width), time (B, time_width) or None -> (B, queries, width)."""

    def __init__(self, config: TSCConfig) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(config.queries, config.width) * config.width**-0.5)
        if config.timestep != "off":
            self.time_aware_linear = nn.Linear(config.time_width, config.width)
        self.proj_in = nn.Linear(config.in_width, config.width)
        self.perceiver_blocks = nn.ModuleList([PerceiverBlock(config) for _ in range(config.blocks)])

    def forward(self, text: torch.Tensor, time: torch.Tensor | None, hidden_keys: torch.Tensor | None) -> torch.Tensor:
        latents = self.latents.expand(len(text), -1, -1)
        if time is not None:
            latents = latents + self.time_aware_linear(F.silu(time))[:, None]
        for block in self.perceiver_blocks:
            latents = block(latents, text, time, hidden_keys)
        return latents


class TSC(nn.Module):
    """The connector. Its state dict has the key names of the released weights."""

    appended = None

    def __init__(self, config: TSCConfig) -> None:
        super().__init__()
        self.config = config
        if config.timestep != "off":
            self.time_embedding = TimeEmbedding(config)
        self.connector = Resampler(config)

    def read(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """hidden (B, L, in_width) -> text (B, L, width); without a timestep the tokens (B, queries, width) themselves."""
        text = self.connector.proj_in(hidden.to(self.connector.latents.dtype))
        return self._resampled(text, mask, None) if self.config.timestep == "off" else text

    def at(
        self, text: torch.Tensor, mask: torch.Tensor, timestep: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """text as `read` gave it, mask (B, L) bool, timestep (B,) -> tokens (B, queries, width), None."""
        if self.config.timestep == "off":
            return text, None
        dtype = self.connector.latents.dtype
        at_least = torch.promote_types(dtype, torch.float32)  # bfloat16 holds no timestep above 256 exactly
        features = sinusoid(timestep, self.config.time_channels, at_least).to(dtype)
        return self._resampled(text, mask, self.time_embedding(features)), None

    def _resampled(self, text: torch.Tensor, mask: torch.Tensor, time: torch.Tensor | None) -> torch.Tensor:
        hidden_keys = None
        if self.config.use_mask == "mask":
            hidden_keys = torch.cat([mask.new_zeros(len(mask), self.config.queries), ~mask], dim=1)
        return self.connector(text, time, hidden_keys)
