"""Learned queries behind the prompt, which the frozen language model answers (MetaQuery, Pan et al. 2025, arXiv 2504.06256;
OpenUni, Wu et al. 2025, arXiv 2505.23661).

A transformer reads the hidden states at the queries' places in the language model's width and projects them afterwards
(MetaQuery's "Enc-Proj", which beats projecting first, section 3.3). Gradients flow through the language model to the queries.
"""

from __future__ import annotations

import torch
from torch import nn

from .configuration import QueriesConfig


class Queries(nn.Module):
    """The connector; `appended` is what the language model is to read behind each prompt."""

    def __init__(self, config: QueriesConfig) -> None:
        super().__init__()
        self.config = config
        width = config.in_width
        self.appended = nn.Parameter(torch.randn(config.queries, width) * width**-0.5)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, config.heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(config.blocks)
        )
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, config.width)

    def read(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """hidden (B, queries, in_width) at the queries' places -> tokens (B, queries, width)."""
        hidden = hidden.to(self.appended.dtype)
        for block in self.blocks:
            hidden = block(hidden)
        return self.proj(self.norm(hidden))

    def at(
        self, text: torch.Tensor, mask: torch.Tensor, timestep: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The tokens as they were read, all of them to be seen; the timestep is not looked at."""
        return text, None
