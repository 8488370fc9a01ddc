"""What is trained in pieces over processes: each holds its own of weights, gradients, moments and averages (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn

from .bridge import Bridge, Weights


def spread(bridge: Bridge, device: torch.device) -> None:
    """Leaves this process its piece of every parameter, at once for each block of the connector and for what is around them.

    The bridge's forward puts them together while it runs, and all processes must call it alike. By torch's `fully_shard`:
    accelerate takes no FSDP2 on CPUs, where this is tested, and would cast what is to stay float32.
    """
    from torch.distributed import get_world_size
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (get_world_size(),))
    bridge.to(device)
    for layers in [module for module in bridge.connector.modules() if isinstance(module, nn.ModuleList)]:
        for block in layers:
            fully_shard(block, mesh=mesh)
    fully_shard(bridge, mesh=mesh)


def in_pieces(module: nn.Module) -> bool:
    """Whether `spread` was here."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


@contextmanager
def unsynced(accelerator: Any, wrapped: nn.Module) -> Iterator[None]:
    """Inside, gradients are added up by each process alone: another micro-batch follows. `wrapped` is in pieces, or DDP's."""
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(wrapped, FSDPModule):
        with accelerator.no_sync(wrapped):
            yield
        return
    wrapped.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        wrapped.set_requires_gradient_sync(True)


def whole_bridge(bridge: Bridge) -> Bridge:
    """A copy that this process can call alone, its methods too, where `bridge` is in pieces; all processes must ask at once.
    Any other as it is.
    """
    if not in_pieces(bridge):
        return bridge
    with torch.device("meta"):  # draws nothing
        found = Bridge(bridge.config)
    found.load_state_dict(whole_of(bridge.state_dict()), assign=True)
    # accelerate put its autocast into the bridge's own `forward`.
    found.forward = MethodType(bridge.forward.__func__, found)  # type: ignore[attr-defined, method-assign]
    return found.train(bridge.training)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in pieces put together, which all processes must ask for at once; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def whole_of(weights: Weights) -> Weights:
    """Named tensors put together; as `whole`."""
    return {name: whole(tensor.detach()) for name, tensor in weights.items()}


def piece(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor: all, where it is not in pieces."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def scattered(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's piece of a whole tensor that every process has, where `like` is in pieces; else the tensor as it is."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
