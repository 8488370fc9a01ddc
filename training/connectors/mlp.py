"""The control: a two-layer MLP on every hidden state, as LLaVA's projector (ELLA's Table 6, 2,164,224 parameters)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """The shape of an MLP connector; the defaults are those of ELLA's ablation."""

    kind: Literal["mlp"] = "mlp"
    """Names the connector in files."""
    in_width: int = 2048
    """Width of the language model's hidden states."""
    width: int = 768
    """Width of the tokens that the denoiser's cross-attention reads."""
    use_mask: Literal["all", "mask"] = "mask"
    """Which tokens the denoiser may see: all, pads included, or only those of real tokens."""

    def __post_init__(self) -> None:
        for name in ("in_width", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"mlp.{name} is {getattr(self, name)}: it must be at least 1")
        if self.use_mask not in ("all", "mask"):
            raise ValueError(f"mlp.use_mask is {self.use_mask!r}: choose 'all' or 'mask'")


class MLP(nn.Module):
    """Linear-GELU-Linear; it knows neither the timestep nor the neighbours of a token."""

    def __init__(self, config: MLPConfig) -> None:
        super().__init__()
        self.config = config
        self.linear_1 = nn.Linear(config.in_width, config.width)
        self.linear_2 = nn.Linear(config.width, config.width)

    def forward(
        self, hidden: torch.Tensor, mask: torch.Tensor, timestep: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden (B, L, in_width), mask (B, L) bool, timestep (B,) unused -> tokens (B, L, width), mask or None."""
        tokens = self.linear_2(nn.functional.gelu(self.linear_1(hidden.to(self.linear_1.weight.dtype))))
        return tokens, mask if self.config.use_mask == "mask" else None
