"""The truth that the filtering benchmark judges by: which sentence is wrong, and in what."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.filtering import KINDS, auc, best_threshold, make_cases
from examples.shapes.making.measure import held_out
from examples.shapes.oracle import read_caption
from stages.sentences import split_sentences

SCENES, RNG = held_out(60, (1, 1, 1, 1), seed=3)
CASES = make_cases(SCENES, RNG, long_from=78)
RIGHT = {case.picture: split_sentences(case.caption) for case in CASES if case.kind == "right"}
LONG = {case.picture: split_sentences(case.caption) for case in CASES if case.kind == "long_right"}


@pytest.mark.parametrize("kind", [*KINDS, *(f"long_{kind}" for kind in KINDS[:-1])])
def test_one_sentence_is_wrong_and_in_one_thing(kind: str) -> None:
    cases = [case for case in CASES if case.kind == kind]
    assert len(cases) > 20
    for case in cases:
        said, right = split_sentences(case.caption), (LONG if kind.startswith("long_") else RIGHT)[case.picture]
        assert [n for n, (a, b) in enumerate(zip(said, right, strict=True)) if a != b] == [case.wrong]
        claimed, true = read_caption(said[case.wrong]), SCENES.facts(case.picture)
        what = kind.removeprefix("long_")
        if what == "background":
            assert claimed.ground != true.ground and claimed.texture != true.texture
            continue
        (thing,), (was,) = claimed.things, read_caption(right[case.wrong]).things
        changed = {fact for fact in ("colour", "shape", "size", "place") if getattr(thing, fact) != getattr(was, fact)}
        assert was in true.things and changed == ({"colour", "shape"} if what == "object" else {what})
        if what == "object":
            assert (thing.colour, thing.shape) not in {(t.colour, t.shape) for t in true.things}
        if kind.startswith("long_"):
            assert sum(len(s.split()) for s in said[: case.wrong]) > 70


def test_auc_and_threshold() -> None:
    right, wrong = np.array([0.5, 0.6, 0.7]), np.array([0.1, 0.5, 0.2, 0.15])
    assert auc(right, wrong) == pytest.approx((3.5 + 4 + 4) / 12)
    assert best_threshold(right, wrong) == 0.5
    assert auc(right, right) == pytest.approx(0.5)
