"""The oracle: it reads pictures and captions right, and what it calls better is better."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from examples.shapes import words
from examples.shapes.making.pictures import as_seen
from examples.shapes.oracle import (
    ROTATIONS,
    fact_f1,
    read_caption,
    read_pictures,
    score_pictures,
    score_with_shuffle,
)
from examples.shapes.world import Facts, Scenes, Thing, draw_scenes, render

SCENES = draw_scenes(np.random.default_rng(11), 400, (0.25,) * 4)


def right(read: Scenes, true: Scenes) -> float:
    """Share of scenes that were read without any fault."""
    return float(((read.cells == true.cells).all(axis=1) & (read.ground == true.ground)).mean())


@pytest.mark.parametrize("side", [16, 24, 32])
def test_clean_pictures_are_read(side: int) -> None:
    assert right(read_pictures(render(SCENES, side)), SCENES) >= 0.995


@pytest.mark.parametrize("side", [16, 24])
def test_pictures_are_read_after_jpeg_and_resize(side: int) -> None:
    assert right(read_pictures(as_seen(SCENES, np.random.default_rng(0), side)), SCENES) >= 0.995


def test_noise_does_not_stop_it() -> None:
    pictures = render(SCENES, 24) + np.random.default_rng(0).normal(0, 12, (400, 24, 24, 3))
    assert right(read_pictures(pictures), SCENES) >= 0.98


def test_captions_are_read_back() -> None:
    facts = [SCENES.facts(n) for n in range(len(SCENES))]
    claimed = [read_caption(words.dense_caption(f, np.random.default_rng(n))) for n, f in enumerate(facts)]
    assert all(value["f1"] == 1 for value in fact_f1(claimed, facts).values())


def test_what_a_caption_leaves_out_is_not_read() -> None:
    facts = read_caption("A red circle is in the top left corner. A shape. There is a square. top right corner.")
    assert facts == Facts(
        things=(Thing(shape="circle", colour="red", size="", place="top left"),), ground="", texture=""
    )
    twice = read_caption("The top left corner holds a small red circle. In the top left there is a large blue square.")
    assert [t.shape for t in twice.things] == ["circle"]
    sized = read_caption("The top left corner holds a circle of small size and red colour.")
    assert sized.things[0].size == "small"
    assert read_caption("") == Facts(things=(), ground="", texture="")


def test_fact_f1_by_hand() -> None:
    thing = Thing(shape="circle", colour="red", size="small", place="top left")
    true = Facts(things=(thing,), ground="navy", texture="plain")
    moved = replace(true, things=(replace(thing, place="top right"),))
    other = replace(true, things=(replace(thing, colour="blue"),), texture="striped")
    assert fact_f1([true], [true])["all"] == {"precision": 1, "recall": 1, "f1": 1}
    assert fact_f1([moved], [true])["colour"]["f1"] == 0  # the right colour in the wrong place is wrong
    scores = fact_f1([other], [true])
    assert (scores["colour"]["f1"], scores["shape"]["f1"], scores["texture"]["f1"]) == (0, 1, 0)
    assert scores["all"]["precision"] == pytest.approx(4 / 6)
    silent = fact_f1([replace(true, things=())], [true])["all"]
    assert silent["precision"] == 1 and silent["recall"] == pytest.approx(2 / 6)


def test_scores_of_the_prompted_picture_itself() -> None:
    for measure, values in score_pictures(SCENES, SCENES).items():
        assert (values == 1).all(), measure


def test_scores_by_hand() -> None:
    prompted = Scenes(cells=np.array([[1, 2 + 16, 0, 0]]), ground=np.array([0]))  # small red circle, large red square
    drawn = Scenes(cells=np.array([[2 + 16, 3, 1, 0]]), ground=np.array([0]))
    scores = {k: float(v[0]) for k, v in score_pictures(drawn, prompted).items()}
    # top left: there, red, but a large square; top right: there, but a small green circle
    assert scores["fact"] == pytest.approx((2 / 4 + 1 / 4) / 2)
    assert (scores["full"], scores["bag"], scores["count"], scores["precision"]) == (0, 1, 0, 0)


def test_shuffled_and_corrected_follow_their_definitions() -> None:
    drawn, prompted = SCENES[:30], SCENES[30:60]
    scores = score_with_shuffle(drawn, prompted)
    order = np.arange(30)
    for measure, score in scores.items():
        others = [score_pictures(drawn, prompted[np.roll(order, k)])[measure] for k in range(1, ROTATIONS + 1)]
        assert np.allclose(score.shuffled, np.mean(others, axis=0))
        assert np.allclose(score.corrected, score.raw - score.shuffled)
    perfect = score_with_shuffle(prompted, prompted)
    assert perfect["full"].corrected.mean() > 0.9


def test_more_objects_raise_raw_but_not_corrected() -> None:
    """Who fills every corner at random recalls more of any prompt, and has understood nothing."""
    prompted = draw_scenes(np.random.default_rng(1), 8000, (0, 1))
    few = score_with_shuffle(draw_scenes(np.random.default_rng(2), 8000, (1,)), prompted)
    many = score_with_shuffle(draw_scenes(np.random.default_rng(3), 8000, (0, 0, 0, 1)), prompted)
    for measure in ("fact", "bag"):
        assert many[measure].raw.mean() > 2 * few[measure].raw.mean()
        assert abs(many[measure].corrected.mean()) < 0.01 and abs(few[measure].corrected.mean()) < 0.01
