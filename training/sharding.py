"""What is trained in pieces over processes: each holds a share of weights, gradients, moments and averages (FSDP2)."""

from __future__ import annotations

import torch

from .bridge import Weights


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor put together, which all processes must ask for at once; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def whole_of(weights: Weights) -> Weights:
    """Named tensors put together; as `whole`."""
    return {name: whole(tensor.detach()) for name, tensor in weights.items()}


def scattered(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's share of a whole tensor that every process has, where `like` is sharded; else the tensor as it is."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
