"""image embedding + caption + alt text → CLIP scores. CLIP reads 77 tokens, so a dense caption is scored as a whole (cut
there) and sentence by sentence, which is never cut. No picture is opened, so a new caption costs its own text alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.fingerprint import model_id
from pipeline.stage import Columns, Stage

from .clip import EMBEDDING, ClipConfig, load_half, stored, unit_vectors


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(ClipConfig):
    """Which CLIP embeds the texts, and where; the one that embedded the pictures."""


class Score(Stage):
    """Reads image_embedding, caption, text; writes their cosine similarities and the caption's unit embedding."""

    name = "score"
    reads = ("image_embedding", "caption", "text")
    writes = pa.schema(
        [
            ("clip_score", pa.float32()),
            ("sentence_scores", pa.list_(pa.float32())),
            ("alt_score", pa.float32()),
            ("caption_embedding", EMBEDDING),
        ]
    )
    drops = False
    config: ScoreConfig

    @property
    def spaces(self) -> dict[str, str]:
        """The model whose embeddings are read and written: one, or the scores mean nothing."""
        return {"image_embedding": self.config.space, "caption_embedding": self.config.space}

    def identity(self) -> Any:
        """The settings, with the model's weights in place of its name."""
        settings = super().identity()
        return {**settings, "model": model_id(self.config.model, self.config.revision), "revision": None}

    def load(self) -> None:
        """Loads the model's text half and its tokenizer."""
        from transformers import AutoTokenizer

        config = self.config
        self._tokenizer = AutoTokenizer.from_pretrained(config.model, revision=config.revision, trust_remote_code=False)
        self._model = load_half(config, "text")

    def process(self, batch: pa.Table) -> Columns:
        """Embeds captions, their sentences and alt texts in one forward pass, and holds them against the pictures."""
        captions, alts = batch.column("caption").to_pylist(), batch.column("text").to_pylist()
        sentences = [split_sentences(c) for c in captions]
        images = np.array(batch.column("image_embedding").to_pylist(), np.float32)
        texts = self._texts([*captions, *alts, *(s for group in sentences for s in group)])
        whole, alt, parts = np.split(texts, [len(captions), 2 * len(captions)])
        groups = np.split(parts, np.cumsum([len(g) for g in sentences])[:-1])
        return {
            "clip_score": _rounded((images * whole).sum(1)),
            "sentence_scores": [_rounded(g @ image) for g, image in zip(groups, images, strict=True)],
            "alt_score": [s if a.strip() else None for s, a in zip(_rounded((images * alt).sum(1)), alts, strict=True)],
            "caption_embedding": stored(whole),
        }

    def _texts(self, texts: list[str]) -> np.ndarray:
        import torch

        given = self._tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(self._model.device)
        with torch.inference_mode():
            return unit_vectors(self._model(**given).text_embeds)


def split_sentences(caption: str) -> list[str]:
    """The caption's sentences; the caption itself where it has no more than one."""
    found = [s.strip() for s in re.split(r"(?<=[.!?])\s+", caption) if s.strip()]
    return found or [caption]


def _rounded(scores: np.ndarray) -> list[float]:
    """To four decimals: beyond them a score depends on what else was in the batch."""
    return [round(float(s), 4) for s in scores]
