"""caption + sentence scores → the caption without the sentences that its picture does not support. No model, no picture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.stage import Columns, Stage

from .score import summaries
from .sentences import join_sentences, split_sentences

_REFERRING = {"it", "its", "he", "his", "him", "she", "her", "hers", "they", "their", "them", "theirs"}


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """Which sentences the picture does not support. At least one rule; a sentence must pass all that are set."""

    min_score: float | None = None
    """Least score of a sentence."""
    max_below_mean: float | None = None
    """How far a sentence may score below the mean of its caption's. Pictures differ in how high their sentences score."""

    def __post_init__(self) -> None:
        if self.min_score is None and self.max_below_mean is None:
            raise ValueError("prune has no rule: set min_score, max_below_mean or both")
        if self.max_below_mean is not None and self.max_below_mean < 0:
            raise ValueError(f"prune: max_below_mean cannot be negative, got {self.max_below_mean}")


class Prune(Stage):
    """Reads caption, sentence_scores; writes both again without the sentences pruned, and those; and short_caption again,
    null where it is one of those (or there is none).

    A sentence that opens with a pronoun goes with the sentence before it, of which it speaks. Where nothing is left the
    caption is empty, and `clip_filter` drops the row. clip_score and caption_embedding remain those of the whole caption.
    """

    name = "prune"
    reads = ("caption", "sentence_scores", "short_caption")
    optional = ("short_caption",)
    writes = pa.schema(
        [
            ("caption", pa.string()),
            ("short_caption", pa.string()),
            ("sentence_scores", pa.list_(pa.float32())),
            ("min_sentence_score", pa.float32()),
            ("mean_sentence_score", pa.float32()),
            ("pruned", pa.list_(pa.string())),
        ]
    )
    drops = False
    config: PruneConfig

    def process(self, batch: pa.Table) -> Columns:
        """Prunes the batch's captions."""
        captions, kept_scores, pruned = list[str](), list[np.ndarray](), list[list[str]]()
        for caption, listed in zip(*(batch.column(c).to_pylist() for c in ("caption", "sentence_scores")), strict=True):
            sentences, scores = split_sentences(caption), np.array(listed, np.float32)
            kept = self._supported(sentences, scores)
            chosen = [s for s, k in zip(sentences, kept, strict=True) if k]
            captions.append(caption if kept.all() else join_sentences(chosen))
            kept_scores.append(scores[kept])
            pruned.append([s for s, k in zip(sentences, kept, strict=True) if not k])
        told = "short_caption" in batch.column_names
        shorts = batch.column("short_caption").to_pylist() if told else [None] * batch.num_rows
        return {
            "caption": captions,
            "short_caption": [None if s in gone else s for s, gone in zip(shorts, pruned, strict=True)],
            "sentence_scores": kept_scores,
            **summaries(kept_scores),
            "pruned": pruned,
        }

    def _supported(self, sentences: list[str], scores: np.ndarray) -> np.ndarray:
        """Whether each sentence stays, bool (S,). A score that is no number is no support."""
        kept = ~np.isnan(scores)
        if self.config.min_score is not None:
            kept &= scores >= np.float32(self.config.min_score)
        if self.config.max_below_mean is not None:
            kept &= np.round(scores.mean() - scores, 4) <= np.float32(self.config.max_below_mean)
        for spot in range(1, len(sentences)):
            kept[spot] &= kept[spot - 1] or not _refers_back(sentences[spot])
        return kept


def _refers_back(sentence: str) -> bool:
    """Whether it opens with a word that stands for something said before: "It is red.", "Their hats …"."""
    return sentence.split(maxsplit=1)[0].strip("\"'“‘(").split("'")[0].split("’")[0].lower() in _REFERRING
