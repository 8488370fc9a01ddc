"""The control: a two-layer MLP on every hidden state, as LLaVA's projector (ELLA's Table 6, 2,164,224 parameters)."""

from __future__ import annotations

import torch
from torch import nn

from .configuration import MLPConfig


class MLP(nn.Module):
    """Linear-GELU-Linear; it knows neither the timestep nor the neighbours of a token."""

    appended = None

    def __init__(self, config: MLPConfig) -> None:
        super().__init__()
        self.config = config
        self.linear_1 = nn.Linear(config.in_width, config.width)
        self.linear_2 = nn.Linear(config.width, config.width)

    def read(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """hidden (B, L, in_width) -> tokens (B, L, width)."""
        return self.linear_2(nn.functional.gelu(self.linear_1(hidden.to(self.linear_1.weight.dtype))))

    def at(
        self, text: torch.Tensor, mask: torch.Tensor, timestep: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The tokens as they were read, and the mask (B, L) bool or None; the timestep is not looked at."""
        return text, mask if self.config.use_mask == "mask" else None
