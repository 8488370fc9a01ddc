"""The control: a two-layer MLP on every hidden state, as LLaVA's projector (ELLA's Table 6, 2,164,224 parameters)."""

from __future__ import annotations

import torch
from torch import nn

from .configuration import MLPConfig


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
