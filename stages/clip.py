"""What `embed` and `score` share: which CLIP, the half of it that each loads, and vectors that can be compared."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from pipeline.stage import Needs

EMBEDDING = pa.list_(pa.float32())
"""Type of a column of embeddings: unit vectors, rounded to 16-bit precision."""


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Which CLIP, and where. Embeddings of two models cannot be compared: give `embed` and `score` the same one."""

    model: str
    """Folder or hub name of a CLIP model."""
    revision: str | None = None
    """Commit of the hub repository; pin it."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number type of the weights."""
    device: str = "auto"
    """Where the model runs: `auto` is cuda where there is one."""
    batch_size: int = 128
    """Samples worked on at a time."""
    needs: Needs = field(default_factory=lambda: Needs(cpus=1.0, gpus=0.25, memory_gb=4))
    """What an actor takes."""

    @property
    def space(self) -> str:
        """Names the space in which the embeddings lie, for `check_stages`."""
        return f"{self.model}@{self.revision or 'main'}"


def load_half(config: ClipConfig, half: Literal["text", "vision"]) -> Any:
    """One half of the model with its projection into the common space; safetensors only, no remote code."""
    import torch
    from transformers import CLIPConfig, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    pinned: dict[str, Any] = {"revision": config.revision, "trust_remote_code": False}
    whole = CLIPConfig.from_pretrained(config.model, **pinned)
    part = whole.text_config if half == "text" else whole.vision_config
    part.projection_dim = whole.projection_dim  # the halves' own field is not always set; the whole's is what counts
    kind = CLIPTextModelWithProjection if half == "text" else CLIPVisionModelWithProjection
    dtype = getattr(torch, config.dtype)
    model = kind.from_pretrained(config.model, config=part, dtype=dtype, use_safetensors=True, **pinned)
    return model.to(device).eval().requires_grad_(False)


def unit_vectors(features: Any) -> np.ndarray:
    """Features of a model (N, width) at length one, float32: their products are cosines."""
    vectors = features.float().cpu().numpy()
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def stored(vectors: np.ndarray) -> list[np.ndarray]:
    """Embeddings as they are written, one a row: to 16 bits, for beyond them they depend on what else was in the batch."""
    return list(vectors.astype(np.float16).astype(np.float32))
