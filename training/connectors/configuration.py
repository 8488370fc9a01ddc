"""The connectors' settings, apart from their modules: a recipe is read, and a build planned, without loading torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

POOL_HEADS = 8
"""Attention heads of what pools the tokens."""


@dataclass(frozen=True, kw_only=True)
class ConnectorSettings:
    """What the settings of all connectors hold."""

    in_width: int = 2048
    """Width of the language model's hidden states; 2048 is flan-T5-XL."""
    width: int = 768
    """Width of the tokens that the denoiser's cross-attention reads."""
    layers: int = 1
    """Hidden states that come in for each token. More than one (language_model.layers "all") are each normalised and weighed
    by learned weights, one a layer."""
    pooled_width: int | None = None
    """Width of the one vector for the whole text that some denoisers want besides (SDXL: 1280), pooled from the tokens by
    attention. None where the denoiser wants none."""

    def check(self, kind: str) -> None:
        """Raises ValueError where a number is not whole or below 1, or a word is none of its choices."""
        for field in fields(self):
            value = getattr(self, field.name)
            whole = field.type in ("int", "int | None") and value is not None
            if whole and (type(value) is not int or value < 1):
                raise ValueError(f"{kind}.{field.name} is {value!r}: it must be a whole number, at least 1")
        if self.pooled_width and self.width % POOL_HEADS:
            raise ValueError(
                f"{kind}.width {self.width} is not a multiple of {POOL_HEADS}, the heads that pool: change it"
            )
        if getattr(self, "use_mask", "all") not in ("all", "mask"):
            raise ValueError(f"{kind}.use_mask is {self.use_mask!r}: choose 'all' or 'mask'")  # type: ignore[attr-defined]

    def check_heads(self, kind: str, width: int, heads: int) -> None:
        """Raises ValueError where attention heads do not divide the width."""
        if width % heads:
            raise ValueError(f"{kind}.width {width} is not a multiple of {kind}.heads {heads}: change one of them")


@dataclass(frozen=True, kw_only=True)
class TSCConfig(ConnectorSettings):
    """The shape of a TSC; the defaults are those of the released SD 1.5 weights. Without the timestep it is a resampler."""

    kind: Literal["tsc"] = "tsc"
    """Names the connector in files."""
    timestep: Literal["adaln", "adaln_zero", "off"] = "adaln"
    """How the timestep enters: shift and scale of every layer norm (ELLA); the same with DiT's gates, which start every
    block as the identity (ELLA's ablation); or not at all, with layer norms of learned shift and scale (a resampler)."""
    blocks: int = 6
    """Perceiver blocks."""
    heads: int = 8
    """Attention heads; they divide `width`."""
    queries: int = 64
    """Learned latents, and so tokens out; 64 to 256 in the literature."""
    time_channels: int = 320
    """Channels of the sinusoidal timestep features; even."""
    time_width: int = 768
    """Width of the timestep embedding."""
    use_mask: Literal["all", "mask"] = "all"
    """Which hidden states the latents may see: all, pads included (as released), or only those of real tokens."""

    def __post_init__(self) -> None:
        self.check(self.kind)
        self.check_heads(self.kind, self.width, self.heads)
        if self.timestep not in ("adaln", "adaln_zero", "off"):
            raise ValueError(f"tsc.timestep is {self.timestep!r}: choose 'adaln', 'adaln_zero' or 'off'")
        if self.time_channels % 2:
            raise ValueError(f"tsc.time_channels is {self.time_channels}: it must be even (a sine and a cosine each)")


@dataclass(frozen=True, kw_only=True)
class MLPConfig(ConnectorSettings):
    """The shape of an MLP connector; the defaults are those of ELLA's ablation."""

    kind: Literal["mlp"] = "mlp"
    """Names the connector in files."""
    use_mask: Literal["all", "mask"] = "mask"
    """Which tokens the denoiser may see: all, pads included, or only those of real tokens."""

    def __post_init__(self) -> None:
        self.check(self.kind)


@dataclass(frozen=True, kw_only=True)
class LaViConfig(ConnectorSettings):
    """The shape of LaVi-Bridge's adapter; its LoRA are settings of the language model and of the denoiser."""

    kind: Literal["lavi"] = "lavi"
    """Names the connector in files."""
    hidden_width: int | None = None
    """Width between the two feed-forwards; None is the mean of `in_width` and `width`, as LaVi-Bridge."""
    dropout: float = 0.0
    """Between the layers of a feed-forward. LaVi-Bridge: 0.1."""
    use_mask: Literal["all", "mask"] = "all"
    """Which tokens the denoiser may see: all, pads included (LaVi-Bridge with U-Nets), or only real ones (with PixArt)."""

    def __post_init__(self) -> None:
        self.check(self.kind)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lavi.dropout is {self.dropout}: it must be in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class QueriesConfig(ConnectorSettings):
    """Learned queries that the language model itself answers (MetaQuery, Pan et al. 2025, arXiv 2504.06256; OpenUni, Wu et al.
    2025, arXiv 2505.23661): they stand behind the prompt, and a small transformer reads what became of them.
    """

    kind: Literal["queries"] = "queries"
    """Names the connector in files."""
    queries: int = 256
    """Learned queries, and so tokens out. Both papers: 256."""
    blocks: int = 6
    """Transformer blocks after the language model. OpenUni: 6; MetaQuery: 24."""
    heads: int = 8
    """Attention heads; they divide `in_width`, in which the blocks work."""

    def __post_init__(self) -> None:
        self.check(self.kind)
        if self.in_width % self.heads:
            raise ValueError(
                f"queries.in_width {self.in_width} is not a multiple of queries.heads {self.heads}: change one of them"
            )


ConnectorConfig = TSCConfig | MLPConfig | LaViConfig | QueriesConfig
