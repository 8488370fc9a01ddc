"""Which device a model runs on."""

from __future__ import annotations


def device_of(wanted: str) -> str:
    """`wanted` itself; for "auto" the GPU where there is one, else the processor."""
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted
