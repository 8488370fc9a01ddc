"""Which device a model runs on, and how what it reads comes there."""

from __future__ import annotations

from typing import Any


def device_of(wanted: str) -> str:
    """`wanted` itself; for "auto" the GPU where there is one, else the processor."""
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted


def sent(tensor: Any, device: Any) -> Any:
    """A tensor of the processor's on the `torch.device`. A GPU fetches it by itself, out of memory that cannot be swapped, and
    nobody waits: a plain copy would wait for all work queued before it.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
