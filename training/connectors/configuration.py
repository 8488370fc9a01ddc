"""The connectors' settings, apart from their modules: a recipe is read, and a build planned, without loading torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class TSCConfig:
    """The shape of a TSC; the defaults are those of the released SD 1.5 weights."""

    kind: Literal["tsc"] = "tsc"
    """Names the connector in files."""
    in_width: int = 2048
    """Width of the language model's hidden states; 2048 is flan-T5-XL."""
    width: int = 768
    """Width of the tokens that the denoiser's cross-attention reads."""
    blocks: int = 6
    """Perceiver blocks."""
    heads: int = 8
    """Attention heads; they divide `width`."""
    queries: int = 64
    """Learned latents, and so tokens out."""
    time_channels: int = 320
    """Channels of the sinusoidal timestep features; even."""
    time_width: int = 768
    """Width of the timestep embedding."""
    use_mask: Literal["all", "mask"] = "all"
    """Which hidden states the latents may see: all, pads included (as released), or only those of real tokens."""

    def __post_init__(self) -> None:
        for name in ("in_width", "width", "blocks", "heads", "queries", "time_channels", "time_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"tsc.{name} is {getattr(self, name)}: it must be at least 1")
        if self.width % self.heads:
            raise ValueError(f"tsc.width {self.width} is not a multiple of tsc.heads {self.heads}: change one of them")
        if self.time_channels % 2:
            raise ValueError(f"tsc.time_channels is {self.time_channels}: it must be even (a sine and a cosine each)")
        if self.use_mask not in ("all", "mask"):
            raise ValueError(f"tsc.use_mask is {self.use_mask!r}: choose 'all' or 'mask'")


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


ConnectorConfig = TSCConfig | MLPConfig
