"""What `embed` and `score` share: which CLIP or SigLIP, and vectors that can be compared."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from pipeline.fingerprint import model_id, plain
from pipeline.stage import Needs, Stage

EMBEDDING = pa.list_(pa.float16())
"""Type of a column of embeddings: unit vectors, as clip-retrieval keeps them."""


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Which CLIP, and where. Embeddings of two models cannot be compared: give `embed` and `score` the same one."""

    model: str
    """Folder or hub name of a CLIP (or Long-CLIP, or SigLIP) model in transformers' format."""
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

    def identity(self) -> Any:
        """What the embeddings depend on: the settings, with the model's weights in place of its name."""
        settings = plain(self, frozenset(Stage.not_fingerprinted))
        return {**settings, "model": model_id(self.model, self.revision), "revision": None}


def stored(vectors: np.ndarray) -> list[np.ndarray]:
    """Embeddings as they are written, float16, one a row."""
    return list(vectors.astype(np.float16))


def matrix(column: pa.ChunkedArray) -> np.ndarray:
    """A column of embeddings as float32 (N, width)."""
    values = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return values.astype(np.float32).reshape(len(column), -1)
