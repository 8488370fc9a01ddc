"""What the filter keeps, and which reason it gives."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from stages.clip_filter import ClipFilter, ClipFilterConfig

NAN = float("nan")
SENTENCES = [[0.3, 0.25], [0.3, 0.05], [0.2], [0.4], []]
TABLE = pa.table(
    {
        "key": list("abcde"),
        "clip_score": pa.array([0.3, 0.3, 0.2, 0.1, 0.9], pa.float32()),
        "clip_score_cut": pa.array([0.2] * 5, pa.float32()),
        "sentence_scores": SENTENCES,
        "min_sentence_score": pa.array([min(s, default=None) for s in SENTENCES], pa.float32()),
        "mean_sentence_score": pa.array([sum(s) / len(s) if s else None for s in SENTENCES], pa.float32()),
        "alt_score": pa.array([0.3, None, 0.1, 0.2, 0.3], pa.float32()),
    }
)
SCORE, SENTENCE, MEAN, GAIN, CUT = (
    "low_clip_score", "low_sentence_score", "low_sentence_mean", "low_gain", "below_percentile"
)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "reasons"),
    [
        ({}, [None] * 4),
        ({"min_score": -1.0}, [None] * 4),
        ({"min_score": 0.3}, [None, None, SCORE, SCORE]),  # as 32-bit numbers 0.3 is 0.3
        ({"min_score": 0.25, "min_sentence_score": 0.2}, [None, SENTENCE, SCORE, SCORE]),
        ({"min_sentence_mean": 0.19}, [None, MEAN, None, None]),
        ({"min_gain": 0.1}, [GAIN, None, None, GAIN]),  # without an alt text there is nothing to gain over
        ({"cuts": ("clip_score",)}, [None, None, None, CUT]),
        ({"cuts": ("clip_score", "clip_score")}, [None, None, None, CUT]),
        ({"min_score": 0.15, "cuts": ("clip_score",), "min_gain": 0.2}, [GAIN, None, GAIN, SCORE]),
    ],
)
def test_the_first_threshold_that_a_row_misses_is_its_reason(config: dict[str, Any], reasons: list[str | None]) -> None:
    stage = ClipFilter(ClipFilterConfig(**config))
    made = stage.process(TABLE.select(["key", *stage.reads]))
    assert made["reason"] == [*reasons, "nothing_supported"]
    assert [s == "kept" for s in made["status"]] == [r is None for r in made["reason"]]


def test_alt_texts_are_called_supported_or_not_blank_ones_neither_and_drop_nothing() -> None:
    for least, supported in ((None, [True, None, True, True, True]), (0.2, [True, None, False, True, True])):
        made = ClipFilter(ClipFilterConfig(min_alt_score=least)).process(TABLE)
        assert made["alt_supported"] == supported and made["status"][:4] == ["kept"] * 4


def test_a_score_that_is_no_number_is_no_pass() -> None:
    floats = {"clip_score": [NAN, 0.3, 0.3], "min_sentence_score": [0.3, NAN, 0.3], "alt_score": [NAN, None, NAN]}
    table = pa.table({**{n: pa.array(v, pa.float32()) for n, v in floats.items()}, "sentence_scores": [[0.3]] * 3})
    config = ClipFilterConfig(min_score=-1.0, min_sentence_score=-1.0, min_alt_score=-1.0, min_gain=-1.0)
    found = ClipFilter(config).process(table)
    assert found["reason"] == [SCORE, SENTENCE, GAIN] and found["alt_supported"] == [False, None, False]


def test_it_reads_what_it_judges_by_and_no_more() -> None:
    always = ("clip_score", "sentence_scores", "alt_score")
    assert ClipFilter(ClipFilterConfig(min_score=0.2, min_gain=0.0)).reads == always
    assert ClipFilter(ClipFilterConfig(min_sentence_score=0.2, cuts=("clip_score",))).reads == (
        *always, "min_sentence_score", "clip_score_cut"
    )  # fmt: skip
