"""image → CLIP embedding. Stands before the captions, so that a new prompt leaves it as it is."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.fingerprint import model_id
from pipeline.stage import Columns, Stage

from .clip import EMBEDDING, PASS, ClipConfig, load_half, stored, unit_vectors


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(ClipConfig):
    """Which CLIP embeds the pictures, and where."""


class Embed(Stage):
    """Reads image; writes its unit embedding, float16."""

    name = "embed"
    reads = ("image",)
    writes = pa.schema([("image_embedding", EMBEDDING)])
    drops = False
    config: EmbedConfig

    @property
    def spaces(self) -> dict[str, str]:
        """The model whose embeddings are written."""
        return {"image_embedding": self.config.space}

    def identity(self) -> Any:
        """The settings, with the model's weights in place of its name."""
        settings = super().identity()
        return {**settings, "model": model_id(self.config.model, self.config.revision), "revision": None}

    def load(self) -> None:
        """Loads the model's vision half, and its processor on one fixed backend: two backends give different pixels."""
        from transformers import AutoImageProcessor

        config = self.config
        self._model = load_half(config, "vision")
        self._processor = AutoImageProcessor.from_pretrained(
            config.model, backend="pil", revision=config.revision, trust_remote_code=False
        )

    def process(self, batch: pa.Table) -> Columns:
        """Embeds the batch's pictures, `PASS` in each forward pass."""
        pictures = batch.column("image").to_pylist()
        passes = [self._pass(pictures[start : start + PASS]) for start in range(0, len(pictures), PASS)]
        return {"image_embedding": stored(np.concatenate(passes))}

    def _pass(self, pictures: list[bytes]) -> np.ndarray:
        import torch
        from PIL import Image

        opened = [Image.open(io.BytesIO(data)).convert("RGB") for data in pictures]
        pixels = self._processor(images=opened, return_tensors="pt")["pixel_values"]
        filled = torch.cat([pixels, pixels[-1:].expand(PASS - len(pixels), -1, -1, -1)])
        with torch.inference_mode():
            return unit_vectors(self._model(pixel_values=filled.to(self._model.device, self._model.dtype)))[
                : len(pixels)
            ]
