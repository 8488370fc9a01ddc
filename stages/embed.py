"""image → CLIP embedding. Stands before the captions, so that a new prompt leaves it as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline.clip_models import PASS, PictureEncoder
from pipeline.stage import Columns, Stage

from .captioning.engine import decode
from .clip import EMBEDDING, ClipConfig, stored


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(ClipConfig):
    """Which CLIP embeds the pictures, and where."""


class Embed(Stage):
    """Reads image; writes its unit embedding, float16. A picture that cannot be read fails with `not_an_image`."""

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
        return self.config.identity()

    def load(self) -> None:
        """Loads the model's vision half and its processor."""
        config = self.config
        self._encoder = PictureEncoder(config.model, config.revision, dtype=config.dtype, device=config.device)

    def process(self, batch: pa.Table) -> Columns:
        """Embeds the batch's pictures, `PASS` in each forward pass."""
        pictures = batch.column("image").to_pylist()
        starts = range(0, len(pictures), PASS)
        embeddings = [found for start in starts for found in self._embed(decode(pictures[start : start + PASS]))]
        return {
            "image_embedding": embeddings,
            "status": ["failed" if e is None else "kept" for e in embeddings],
            "reason": ["not_an_image" if e is None else None for e in embeddings],
        }

    def _embed(self, opened: list[Image.Image | None]) -> list[np.ndarray | None]:
        """One embedding a picture, None for None."""
        readable = [picture for picture in opened if picture]
        found = iter(stored(self._encoder.embed(readable)) if readable else [])
        return [next(found) if picture else None for picture in opened]
