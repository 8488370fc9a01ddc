"""scores → keep or drop: a caption that its picture does not support goes no further. Touches no picture and no model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.stage import Columns, Stage


@dataclass(frozen=True, kw_only=True)
class ClipFilterConfig:
    """Thresholds on cosine similarities; None asks nothing. ELLA states none; LAION used 0.28 with ViT-B/32."""

    min_score: float | None = None
    """Least score of the whole caption, or of as much of it as the model reads."""
    cuts: tuple[str, ...] = ()
    """Columns whose number must not be below that of `<column>_cut`, which a `percentile` stage of theirs writes."""
    min_sentence_score: float | None = None
    """Least score of the weakest sentence."""
    min_sentence_mean: float | None = None
    """Least mean score of the sentences: unlike min_score it hears of all of a caption that is longer than the window."""
    min_gain: float | None = None
    """Least that the caption must score above the alt text; where there is no alt text it passes."""
    min_alt_score: float | None = None
    """Least score at which the alt text counts as supported; None calls every alt text supported. Drops nothing. Where there
    is no alt text, nothing is said of it."""


class ClipFilter(Stage):
    """Reads the scores that its thresholds ask for; writes alt_supported (null where there is no alt text); drops what is
    below, with the first reason of nothing_supported (all sentences were pruned), low_clip_score, below_percentile,
    low_sentence_score, low_sentence_mean and low_gain.
    """

    name = "clip_filter"
    version = 3
    writes = pa.schema([("alt_supported", pa.bool_())])
    config: ClipFilterConfig

    def __init__(self, config: ClipFilterConfig) -> None:
        super().__init__(config)
        asked = {
            "min_sentence_score": config.min_sentence_score is not None,
            "mean_sentence_score": config.min_sentence_mean is not None,
            **{name: True for column in config.cuts for name in (column, f"{column}_cut")},
        }
        always = ("clip_score", "sentence_scores", "alt_score")
        self.reads = (*always, *(name for name, wanted in asked.items() if wanted and name not in always))

    def process(self, batch: pa.Table) -> Columns:
        """Judges the batch."""
        config, score, alt = self.config, batch.column("clip_score"), batch.column("alt_score")
        passes = {"nothing_supported": pc.greater(pc.list_value_length(batch.column("sentence_scores")), 0)}
        if config.min_score is not None:
            passes["low_clip_score"] = _at_least(score, config.min_score)
        for column in config.cuts:
            cut = batch.column(f"{column}_cut")
            above = _at_least(batch.column(column), cut)
            passes["below_percentile"] = pc.and_(passes.get("below_percentile", True), pc.or_(above, pc.is_null(cut)))
        if config.min_sentence_score is not None:
            passes["low_sentence_score"] = _at_least(batch.column("min_sentence_score"), config.min_sentence_score)
        if config.min_sentence_mean is not None:
            passes["low_sentence_mean"] = _at_least(batch.column("mean_sentence_score"), config.min_sentence_mean)
        if config.min_gain is not None:
            gain = pc.round(pc.subtract(score, alt), 4)
            passes["low_gain"] = pc.or_(_at_least(gain, config.min_gain), pc.is_null(alt))
        reasons = np.full(batch.num_rows, None, object)
        for reason, passed in reversed(passes.items()):
            reasons[~passed.to_numpy()] = reason
        supported = pc.is_valid(alt) if config.min_alt_score is None else _at_least(alt, config.min_alt_score)
        supported = pc.if_else(pc.is_valid(alt), supported, pa.scalar(None, pa.bool_()))
        return {
            "alt_supported": supported.to_pylist(),
            "status": ["dropped" if r else "kept" for r in reasons],
            "reason": reasons.tolist(),
        }


def _at_least(column: pa.ChunkedArray, least: float | pa.ChunkedArray) -> pa.ChunkedArray:
    """Whether each number reaches it, as 32-bit numbers, which scores and cuts are. What is null or NaN does not."""
    bound = pa.scalar(least, pa.float32()) if isinstance(least, float | int) else least
    return pc.fill_null(pc.greater_equal(pc.cast(column, pa.float32(), safe=False), bound), False)
