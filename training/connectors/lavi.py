"""LaVi-Bridge's adapter (Zhao et al. 2024, arXiv 2403.07860): two feed-forwards with GEGLU, a layer norm before each.

in_width -> (in_width + width) / 2 -> width, token by token; no residual, no attention, no timestep. Its LoRA lie in the language
model and in the denoiser (`training/lora.py`). 21.25 M parameters for T5-L and SD 1.4, 113.3 M for T5-L and PixArt, 228.9 M for
Llama-2-7b and SD 1.4.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .configuration import LaViConfig


class FeedForward(nn.Module):
    """GEGLU (Shazeer 2020, arXiv 2002.05202), four times as wide inside as what comes in: (…, in) -> (…, out)."""

    def __init__(self, in_width: int, out_width: int, dropout: float) -> None:
        super().__init__()
        self.gated = nn.Linear(in_width, 8 * in_width)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(4 * in_width, out_width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner, gate = self.gated(x).chunk(2, dim=-1)
        return self.out(self.dropout(inner * F.gelu(gate)))


class LaVi(nn.Module):
    """The adapter; as many tokens out as come in."""

    appended = None

    def __init__(self, config: LaViConfig) -> None:
        super().__init__()
        self.config = config
        hidden_width = config.hidden_width or (config.in_width + config.width) // 2
        self.norm_1 = nn.LayerNorm(config.in_width)
        self.feed_forward_1 = FeedForward(config.in_width, hidden_width, config.dropout)
        self.norm_2 = nn.LayerNorm(hidden_width)
        self.feed_forward_2 = FeedForward(hidden_width, config.width, config.dropout)

    def read(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """hidden (B, L, in_width) -> tokens (B, L, width)."""
        inner = self.feed_forward_1(self.norm_1(hidden.to(self.norm_1.weight.dtype)))
        return self.feed_forward_2(self.norm_2(inner))

    def at(
        self, text: torch.Tensor, mask: torch.Tensor, timestep: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The tokens as they were read, and the mask (B, L) bool or None; the timestep is not looked at."""
        return text, mask if self.config.use_mask == "mask" else None
