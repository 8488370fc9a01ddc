"""scores → keep or drop: a caption that its picture does not support goes no further. Touches no picture and no model."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from pipeline.stage import Columns, Stage


@dataclass(frozen=True, kw_only=True)
class ClipFilterConfig:
    """Thresholds on cosine similarities. ELLA states none; LAION used 0.28 with ViT-B/32."""

    min_score: float
    """Least score of the whole caption."""
    min_sentence_score: float | None = None
    """Least score of the weakest sentence; None asks nothing."""
    min_alt_score: float | None = None
    """Least score at which the alt text counts as supported; None calls every alt text supported. Drops nothing."""


class ClipFilter(Stage):
    """Reads the scores; writes alt_supported; drops what is below the thresholds."""

    name = "clip_filter"
    reads = ("clip_score", "sentence_scores", "alt_score")
    writes = pa.schema([("alt_supported", pa.bool_())])
    config: ClipFilterConfig

    def process(self, batch: pa.Table) -> Columns:
        """Judges the batch."""
        reasons = [
            self._reason(score, sentences)
            for score, sentences in zip(
                batch.column("clip_score").to_pylist(), batch.column("sentence_scores").to_pylist(), strict=True
            )
        ]
        least = self.config.min_alt_score
        alts = batch.column("alt_score").to_pylist()
        return {
            "alt_supported": [a is not None and (least is None or a >= least) for a in alts],
            "status": ["dropped" if r else "kept" for r in reasons],
            "reason": reasons,
        }

    def _reason(self, score: float, sentences: list[float]) -> str | None:
        if not score >= self.config.min_score:  # so that NaN is no pass
            return "low_clip_score"
        least = self.config.min_sentence_score
        return "low_sentence_score" if least is not None and not all(s >= least for s in sentences) else None
