"""The connectors: what stands between the language model's hidden states and the denoiser's cross-attention.

Every connector is called as `connector(hidden (B, L, in_width), mask (B, L) bool, timestep (B,))` and returns
`(tokens (B, Q, width), mask (B, Q) bool or None)`; None means that every token may be attended to.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from .configuration import ConnectorConfig, MLPConfig, TSCConfig

if TYPE_CHECKING:
    from torch import nn

__all__ = ["ConnectorConfig", "MLPConfig", "TSCConfig", "build_connector", "connector_config"]


def build_connector(config: ConnectorConfig) -> nn.Module:
    """A connector with fresh weights, drawn from torch's global generator."""
    match config:
        case TSCConfig():
            from .tsc import TSC

            return TSC(config)
        case MLPConfig():
            from .mlp import MLP

            return MLP(config)


def connector_config(facts: dict[str, Any]) -> ConnectorConfig:
    """The configuration that `pipeline.fingerprint.plain` wrote. Raises ValueError for one that is not known."""
    for kind in (TSCConfig, MLPConfig):
        if facts.get("kind") != kind.kind:
            continue
        unknown = set(facts) - {field.name for field in dataclasses.fields(kind)}
        if unknown:
            raise ValueError(
                f"connector {kind.kind!r} has no setting {sorted(unknown)[0]!r}: use the version that wrote it"
            )
        return kind(**facts)
    raise ValueError(f"there is no connector {facts.get('kind')!r}: choose 'tsc' or 'mlp'")
