"""Pruning: which sentences go, what is left of the caption, and who hears of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.stage import check_stages
from stages.clip_filter import ClipFilter, ClipFilterConfig
from stages.prune import Prune, PruneConfig
from stages.score import Score, ScoreConfig
from tests.small_stages import Small, SmallConfig

CAPTION = "A red dog.  It barks. A cat sleeps. The sky is blue."


def prune(scores: list[float], caption: str = CAPTION, **rules: Any) -> dict[str, Any]:
    table = pa.table(
        {"key": ["a"], "caption": [caption], "sentence_scores": pa.array([scores], pa.list_(pa.float32()))}
    )
    made = pa.Table.from_pydict(Prune(PruneConfig(**rules)).process(table), schema=Prune.writes)
    return made.to_pylist()[0]


def test_sentences_below_the_threshold_go() -> None:
    made = prune([0.3, 0.3, 0.1, 0.2], min_score=0.2)  # 0.2 as a 32-bit number, as the score is
    assert made["caption"] == "A red dog. It barks. The sky is blue." and made["pruned"] == ["A cat sleeps."]
    assert np.allclose(made["sentence_scores"], [0.3, 0.3, 0.2])
    assert (made["min_sentence_score"], made["mean_sentence_score"]) == (np.float32(0.2), np.float32(0.2667))


def test_a_caption_that_is_supported_stays_as_it_is() -> None:
    made = prune([0.3, 0.3, 0.3, 0.3], min_score=0.2, max_below_mean=0.1)
    assert made["caption"] == CAPTION and made["pruned"] == [] and len(made["sentence_scores"]) == 4


def test_sentences_far_below_their_captions_mean_go() -> None:
    assert prune([0.5, 0.5, 0.2, 0.4], max_below_mean=0.1)["pruned"] == ["A cat sleeps."]
    assert prune([0.2, 0.2, 0.2, 0.2], max_below_mean=0.0)["pruned"] == []
    assert prune([0.5, 0.5, 0.2, 0.4], max_below_mean=0.1, min_score=0.45)["pruned"] == [
        "A cat sleeps.", "The sky is blue."
    ]  # fmt: skip


def test_what_speaks_of_a_pruned_sentence_goes_with_it() -> None:
    assert prune([0.1, 0.9, 0.9, 0.9], min_score=0.5)["caption"] == "A cat sleeps. The sky is blue."
    dogs = "Dogs run. They bark. Their owner's late. Italy is far."
    assert prune([0.1, 0.9, 0.9, 0.9], dogs, min_score=0.5)["caption"] == "Italy is far."
    assert prune([0.1, 0.9], "A dog. It's red.", min_score=0.5)["pruned"] == ["A dog.", "It's red."]


def test_a_short_caption_goes_with_its_sentence() -> None:
    shorts = ["A red dog.", "A cat sleeps.", "A dog and a cat.", None]
    columns = {
        "caption": [CAPTION] * 4,
        "sentence_scores": pa.array([[0.3, 0.3, 0.1, 0.3]] * 4, pa.list_(pa.float32())),
    }
    stage = Prune(PruneConfig(min_score=0.2))
    made = stage.process(pa.table({"key": list("abcd"), **columns, "short_caption": shorts}))
    assert made["short_caption"] == ["A red dog.", None, "A dog and a cat.", None]
    assert stage.process(pa.table({"key": list("abcd"), **columns}))["short_caption"] == [None] * 4  # none is written


def test_where_nothing_is_left_the_filter_drops_the_row() -> None:
    made = prune([0.1, 0.1, float("nan"), 0.1], min_score=-1.0, max_below_mean=9.0)
    assert made["caption"] == "" and made["sentence_scores"] == [] and made["min_sentence_score"] is None
    columns = {"clip_score": pa.array([0.9], pa.float32()), "alt_score": pa.array([None], pa.float32())}
    scores = pa.array([made["sentence_scores"]], pa.list_(pa.float32()))
    found = ClipFilter(ClipFilterConfig()).process(pa.table({"key": ["a"], **columns, "sentence_scores": scores}))
    assert (found["status"], found["reason"]) == (["dropped"], ["nothing_supported"])


def test_it_stands_between_score_and_filter() -> None:
    class Captions(Small):
        name = "captions"
        writes = pa.schema([("caption", pa.string()), ("image_embedding", pa.list_(pa.float16()))])

    stages = [Captions(SmallConfig()), Score(ScoreConfig(model="m")), Prune(PruneConfig(min_score=0.1))]
    check_stages([*stages, ClipFilter(ClipFilterConfig(min_sentence_score=0.2))])
    assert not Prune.drops


def test_a_rule_is_asked_for() -> None:
    with pytest.raises(ValueError, match="prune has no rule"):
        PruneConfig()
    with pytest.raises(ValueError, match="max_below_mean cannot be negative"):
        PruneConfig(max_below_mean=-0.1)
