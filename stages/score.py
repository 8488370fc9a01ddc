"""image + caption + alt text → CLIP scores and embeddings. CLIP reads 77 tokens, so a dense caption is scored as a whole
(cut there) and sentence by sentence, which is never cut.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from pipeline.fingerprint import model_id
from pipeline.stage import Columns, Needs, Stage

_EMBEDDING = pa.list_(pa.float32())


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Which CLIP, and where."""

    model: str
    """Folder or hub name of a CLIP model."""
    revision: str | None = None
    """Commit of the hub repository; pin it."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number type of the weights."""
    device: str = "auto"
    """Where the model runs: `auto` is cuda where there is one."""
    batch_size: int = 128
    """Samples scored at a time."""
    needs: Needs = field(default_factory=lambda: Needs(cpus=1.0, gpus=0.25, memory_gb=4))
    """What an actor takes."""


class Score(Stage):
    """Reads image, caption, text; writes their cosine similarities and unit embeddings (16-bit precision)."""

    name = "score"
    reads = ("image", "caption", "text")
    writes = pa.schema(
        [
            ("clip_score", pa.float32()),
            ("sentence_scores", pa.list_(pa.float32())),
            ("alt_score", pa.float32()),
            ("image_embedding", _EMBEDDING),
            ("caption_embedding", _EMBEDDING),
        ]
    )
    drops = False
    config: ScoreConfig

    def identity(self) -> Any:
        """The settings, with the model's weights in place of its name."""
        settings = super().identity()
        return {**settings, "model": model_id(self.config.model, self.config.revision), "revision": None}

    def load(self) -> None:
        """Loads the model, and its processor on one fixed backend: two backends give different scores."""
        import torch
        from transformers import AutoProcessor, CLIPModel

        config = self.config
        device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
        pinned: dict[str, Any] = {"revision": config.revision, "trust_remote_code": False}
        self._processor = AutoProcessor.from_pretrained(config.model, backend="pil", **pinned)
        model = CLIPModel.from_pretrained(
            config.model, dtype=getattr(torch, config.dtype), use_safetensors=True, **pinned
        )
        self._model = model.to(device).eval().requires_grad_(False)

    def process(self, batch: pa.Table) -> Columns:
        """Embeds pictures, captions, their sentences and alt texts, each in one forward pass."""
        captions, alts = batch.column("caption").to_pylist(), batch.column("text").to_pylist()
        sentences = [split_sentences(c) for c in captions]
        images = self._images(batch.column("image").to_pylist())
        texts = self._texts([*captions, *alts, *(s for group in sentences for s in group)])
        whole, alt, parts = np.split(texts, [len(captions), 2 * len(captions)])
        groups = np.split(parts, np.cumsum([len(g) for g in sentences])[:-1])
        return {
            "clip_score": _rounded((images * whole).sum(1)),
            "sentence_scores": [_rounded(g @ image) for g, image in zip(groups, images, strict=True)],
            "alt_score": [s if a.strip() else None for s, a in zip(_rounded((images * alt).sum(1)), alts, strict=True)],
            "image_embedding": list(_half(images)),
            "caption_embedding": list(_half(whole)),
        }

    def _images(self, pictures: list[bytes]) -> np.ndarray:
        import torch
        from PIL import Image

        opened = [Image.open(io.BytesIO(data)).convert("RGB") for data in pictures]
        pixels = self._processor(images=opened, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            found = self._model.get_image_features(pixel_values=pixels.to(self._model.device, self._model.dtype))
        return _unit(found.pooler_output)

    def _texts(self, texts: list[str]) -> np.ndarray:
        import torch

        given = self._processor(text=texts, padding=True, truncation=True, return_tensors="pt").to(self._model.device)
        with torch.inference_mode():
            return _unit(self._model.get_text_features(**given).pooler_output)


def split_sentences(caption: str) -> list[str]:
    """The caption's sentences; the caption itself where it has no more than one."""
    found = [s.strip() for s in re.split(r"(?<=[.!?])\s+", caption) if s.strip()]
    return found or [caption]


def _unit(features: Any) -> np.ndarray:
    vectors = features.float().cpu().numpy()
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _rounded(scores: np.ndarray) -> list[float]:
    """To four decimals: beyond them a score depends on what else was in the batch."""
    return [round(float(s), 4) for s in scores]


def _half(vectors: np.ndarray) -> np.ndarray:
    return vectors.astype(np.float16).astype(np.float32)
