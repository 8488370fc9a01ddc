"""The connectors: what stands between the language model's hidden states and the denoiser's cross-attention.

A connector works in two steps, so that at generation the first is done once for a prompt and not once a denoising step:

    read(hidden (B, L, in_width), mask (B, L) bool) -> text: a tensor, all that does not depend on the timestep
    at(text, mask (B, L) bool, timestep (B,)) -> tokens (B, Q, width), mask (B, Q) bool or None

None for a mask means that every token may be attended to. `appended` is a parameter (N, in_width) where the language model
is to read learned embeddings behind the prompt, and None elsewhere; `hidden` are then those at the embeddings' places.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, get_args

from pipeline.spelling import nearest

from .configuration import ConnectorConfig, LaViConfig, MLPConfig, QueriesConfig, TSCConfig

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "ConnectorConfig",
    "LaViConfig",
    "MLPConfig",
    "QueriesConfig",
    "TSCConfig",
    "build_connector",
    "connector_config",
]


def build_connector(config: ConnectorConfig) -> nn.Module:
    """A connector with fresh weights, drawn from torch's global generator."""
    match config:
        case TSCConfig():
            from .tsc import TSC

            return TSC(config)
        case MLPConfig():
            from .mlp import MLP

            return MLP(config)
        case LaViConfig():
            from .lavi import LaVi

            return LaVi(config)
        case QueriesConfig():
            from .queries import Queries

            return Queries(config)


def connector_config(facts: dict[str, Any]) -> ConnectorConfig:
    """The configuration that `pipeline.fingerprint.plain` wrote. Raises ValueError for one that is not known."""
    kinds = {kind.kind: kind for kind in get_args(ConnectorConfig)}
    name = str(facts.get("kind"))
    if name not in kinds:
        raise ValueError(f"there is no connector {name!r}: {nearest(name, sorted(kinds))}")
    unknown = set(facts) - {field.name for field in dataclasses.fields(kinds[name])}
    if unknown:
        raise ValueError(f"connector {name!r} has no setting {sorted(unknown)[0]!r}: use the version that wrote it")
    return kinds[name](**facts)
