"""All that is trained between a language model and a denoiser, as one module: the connector, the weights of the language
model's layers, what pools the tokens, and the LoRA in both models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .connectors import ConnectorConfig, build_connector
from .connectors.configuration import POOL_HEADS

Weights = dict[str, torch.Tensor]


class Conditioning(NamedTuple):
    """What a denoiser is told of a text."""

    tokens: torch.Tensor
    """(B, Q, width), for cross-attention."""
    mask: torch.Tensor | None
    """(B, Q) bool, which of them may be seen; None is all."""
    pooled: torch.Tensor | None = None
    """(B, pooled_width), the text as one vector, where the denoiser wants it."""


class LayerWeights(nn.Module):
    """Learned, depth-wise weights: hidden states of all layers (B, D, L, W), each normalised -> their mean (B, L, W) by weight.
    All weigh the same at the start, which is the mean of normalised layers that Wang et al. 2025 (arXiv 2506.08210) found best.
    """

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(layers))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if hidden.shape[1] != len(self.weights):
            raise ValueError(
                f"the language model gives {hidden.shape[1]} layers, connector.layers is {len(self.weights)}: make them equal"
            )
        normalised = F.layer_norm(hidden.to(self.weights.dtype), hidden.shape[-1:])
        return torch.einsum("d,bdlw->blw", self.weights.softmax(0), normalised)


class AttentionPool(nn.Module):
    """CLIP's attention pooling (Radford et al. 2021, section 2.4), without its positions.

    Tokens (B, Q, width) -> (B, pooled_width). The mean of the tokens asks them all. ELLA's authors say that theirs for SDXL is
    one (ELLA issue 39), not how large; this one has 15,211,776 parameters there.
    """

    def __init__(self, width: int, pooled_width: int, heads: int = POOL_HEADS) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.c_proj = nn.Linear(width, pooled_width)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        if mask is None:
            asking = tokens.mean(1, keepdim=True)
        else:
            seen = mask[..., None].to(tokens.dtype)
            asking = (tokens * seen).sum(1, keepdim=True) / seen.sum(1, keepdim=True)
        asked = torch.cat([asking, tokens], dim=1)
        if mask is not None:
            mask = F.pad(mask, (1, 0), value=True)[:, None, None]
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for proj, x in ((self.q_proj, asking), (self.k_proj, asked), (self.v_proj, asked))
        )
        return self.c_proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).flatten(1))


class Bridge(nn.Module):
    """The trained parts. The models that the LoRA lie in stay outside; what `training.lora` put into them is the same objects
    here, so that one optimizer, one average over processes and one file know them all, and `train` and `eval` their dropout.
    """

    def __init__(
        self,
        config: ConnectorConfig,
        *,
        language_model_lora: Mapping[str, nn.Module] | None = None,
        denoiser_lora: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.connector: Any = build_connector(config)
        self.layers: Any = LayerWeights(config.layers) if config.layers > 1 else None
        self.pool: Any = AttentionPool(config.width, config.pooled_width) if config.pooled_width else None
        for name, lora in (("language_model_lora", language_model_lora), ("denoiser_lora", denoiser_lora)):
            if lora:  # a module may not be named with dots
                setattr(self, name, nn.ModuleDict({path.replace(".", "/"): part for path, part in lora.items()}))

    @property
    def appended(self) -> torch.Tensor | None:
        """Embeddings (N, in_width) that the language model is to read behind the prompt, or None."""
        return self.connector.appended

    def read(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """hidden (B, L, in_width), or (B, layers, L, in_width) -> what does not depend on the timestep."""
        return self.connector.read(hidden if self.layers is None else self.layers(hidden), mask)

    def at(
        self, text: torch.Tensor, mask: torch.Tensor, timestep: torch.Tensor, beside: Conditioning | None = None
    ) -> Conditioning:
        """text as `read` gave it, mask (B, L) bool, timestep (B,) -> conditioning; the tokens of `beside` stand behind ours."""
        tokens, seen = self.connector.at(text, mask, timestep)
        pooled = None if self.pool is None else self.pool(tokens, seen)
        return (
            Conditioning(tokens, seen, pooled) if beside is None else joined(Conditioning(tokens, seen, pooled), beside)
        )

    def forward(
        self, hidden: torch.Tensor, mask: torch.Tensor, timestep: torch.Tensor, beside: Conditioning | None = None
    ) -> Conditioning:
        """Both steps: hidden states of a text and a timestep -> conditioning."""
        return self.at(self.read(hidden, mask), mask, timestep, beside)


def joined(first: Conditioning, second: Conditioning) -> Conditioning:
    """Both texts' tokens, one behind the other (ELLA first, CLIP behind it); the pooled vector is the first's."""
    tokens = torch.cat([first.tokens, second.tokens.to(first.tokens.dtype)], dim=1)
    if first.mask is None and second.mask is None:
        return Conditioning(tokens, None, first.pooled)
    masks = [
        one.tokens.new_ones(one.tokens.shape[:2], dtype=torch.bool) if one.mask is None else one.mask
        for one in (first, second)
    ]
    return Conditioning(tokens, torch.cat(masks, dim=1), first.pooled)


def parts_of(weights: Weights) -> dict[str, Weights]:
    """A bridge's state dict by part: `connector` in its own layout (the TSC's is ELLA's), `layers`, `pool`, and each
    `…_lora` with the names of peft.
    """
    parts: dict[str, Weights] = {}
    for name, tensor in weights.items():
        part, rest = name.split(".", 1)
        parts.setdefault(part, {})[rest.replace("/", ".")] = tensor
    return parts


def from_parts(parts: Mapping[str, Weights]) -> Weights:
    """The state dict that `parts_of` took apart."""
    whole: Weights = {}
    for part, weights in parts.items():
        for name, tensor in weights.items():
            path, own = name.rsplit(".", 1) if part.endswith("_lora") else ("", name)
            whole[f"{part}.{path.replace('.', '/')}.{own}" if path else f"{part}.{own}"] = tensor
    return whole
