"""Sizes of gradients and of the connector's modulation: what tells that one part learns and another does not."""

from __future__ import annotations

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from .bridge import Bridge
from .connectors.tsc import TSC, AdaLN, sinusoid
from .fsdp import whole, whole_of

FRACTIONS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Of the noise levels: where the modulation is looked at."""


def gradient_norms(bridge: Bridge) -> dict[str, torch.Tensor]:
    """The gradient's norm by part of the bridge (connector, layers, pool, each LoRA), scalars on the device; empty where the
    bridge is one part. All processes must ask at once, as must those of `modulation_norms`.
    """
    parts = {name: [p.grad for p in part.parameters() if p.grad is not None] for name, part in bridge.named_children()}
    found = {name: gradients for name, gradients in parts.items() if gradients}
    if len(found) < 2:
        return {}
    return {name: whole(nn.utils.get_total_norm(gradients)) for name, gradients in found.items()}


@torch.no_grad()
def modulation_norms(bridge: Bridge, times: torch.Tensor) -> dict[str, list[float]]:
    """Root mean squares of shift and scale, and of the gate where there is one, which the timestep gives the layer norms of a
    TSC: one number a block, over its norms, channels and the denoiser's `times` (T,) at `FRACTIONS`. Zero is a connector to
    which the timestep is nothing. Empty for connectors that are not told of the timestep.
    """
    connector = bridge.connector
    if not isinstance(connector, TSC) or connector.config.timestep == "off":
        return {}
    config = connector.config
    at = times[[int(fraction * len(times)) for fraction in FRACTIONS]]
    waves = sinusoid(at, config.time_channels, connector.connector.latents.dtype)
    time = F.silu(_applied(connector.time_embedding, waves))
    names = ("adaln_shift", "adaln_scale", "adaln_gate")
    found: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for block in connector.connector.perceiver_blocks:
        norms = [norm for norm in block.children() if isinstance(norm, AdaLN)]
        # (times, 2 or 3, width) each.
        given = [_applied(norm.linear, time).unflatten(-1, (-1, config.width)) for norm in norms]
        for number, name in enumerate(names):
            of_all = [one[:, number] for one in given if one.shape[1] > number]
            if of_all:
                found[name].append(torch.stack(of_all).square().mean().sqrt())
    return {name: torch.stack(values).tolist() for name, values in found.items() if values}


def _applied(module: nn.Module, given: torch.Tensor) -> torch.Tensor:
    """What a part of a module that may lie in pieces makes of a tensor."""
    return functional_call(module, whole_of(dict(module.named_parameters())), (given,))
