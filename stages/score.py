"""image embedding + caption + alt text → CLIP scores. CLIP reads 77 tokens and a dense caption has more, so a caption is
scored as a whole (cut there, and it is said how much was read) and sentence by sentence. No picture is opened: a new
caption costs its own text alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.clip_models import TextEncoder
from pipeline.stage import Columns, Stage

from .clip import EMBEDDING, ClipConfig, matrix, stored
from .sentences import split_sentences


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(ClipConfig):
    """Which CLIP embeds the texts, and where; the one that embedded the pictures. A Long-CLIP reads 248 tokens."""


class Score(Stage):
    """Reads image_embedding, caption, text; writes their cosine similarities and the caption's unit embedding.

    clip_tokens is what the whole caption has, clip_truncated whether that is more than the model reads, so that clip_score
    and caption_embedding tell of its beginning only. sentence_scores has one score a sentence of `split_sentences`, of which
    sentences_truncated were too long as well. alt_score is null where the alt text is blank.
    """

    name = "score"
    version = 2
    reads = ("image_embedding", "caption", "text")
    writes = pa.schema(
        [
            ("clip_score", pa.float32()),
            ("clip_tokens", pa.int32()),
            ("clip_truncated", pa.bool_()),
            ("sentence_scores", pa.list_(pa.float32())),
            ("min_sentence_score", pa.float32()),
            ("mean_sentence_score", pa.float32()),
            ("sentences_truncated", pa.int32()),
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
        return self.config.identity()

    def load(self) -> None:
        """Loads the model's text half and its tokenizer."""
        config = self.config
        self._encoder = TextEncoder(config.model, config.revision, dtype=config.dtype, device=config.device)

    def process(self, batch: pa.Table) -> Columns:
        """Embeds captions, their sentences and alt texts, and holds them against the pictures."""
        captions, alts = batch.column("caption").to_pylist(), [a or "" for a in batch.column("text").to_pylist()]
        sentences = [split_sentences(c) for c in captions]
        counts = [len(group) for group in sentences]
        ends = np.cumsum(counts)[:-1]
        owner = np.repeat(np.arange(len(captions)), counts)  # per sentence the row that it is of
        images = matrix(batch.column("image_embedding"))
        vectors, tokens = self._encoder.embed([*captions, *alts, *(s for group in sentences for s in group)])
        whole, alt, parts = np.split(vectors, [len(captions), 2 * len(captions)])
        cut = tokens > self._encoder.window
        groups = np.split(cosines(parts, images[owner]), ends)
        alt_scores = cosines(alt, images).tolist()
        return {
            "clip_score": list(cosines(whole, images)),
            "clip_tokens": list(tokens[: len(captions)]),
            "clip_truncated": list(cut[: len(captions)]),
            "sentence_scores": groups,
            **summaries(groups),
            "sentences_truncated": [int(sum(c)) for c in np.split(cut[2 * len(captions) :], ends)],
            "alt_score": [s if a.strip() else None for s, a in zip(alt_scores, alts, strict=True)],
            "caption_embedding": stored(whole),
        }


def cosines(vectors: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Of unit vectors, pair by pair, to four decimals, which is more than they mean: float32 (N,)."""
    return np.round((vectors * others).sum(axis=1), 4)


def summaries(scores: Sequence[np.ndarray]) -> dict[str, list[float | None]]:
    """The columns that tell of each row's sentence scores in one number; null where a row has none."""
    return {
        "min_sentence_score": [float(s.min()) if len(s) else None for s in scores],
        "mean_sentence_score": [round(float(s.mean()), 4) if len(s) else None for s in scores],
    }
