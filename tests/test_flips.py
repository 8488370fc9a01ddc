"""Which pictures may be mirrored: none whose captions tell left from right."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.told_views import make_told_view
from training.flips import captions_of, check_flips, may_flip, speaks_of_sides


@pytest.mark.parametrize(
    "text",
    ["A dog LEFT of a tree", "the right-hand door", "the leftmost cup", "it turns counterclockwise", "in the upper-left corner",
     "facing leftwards", "左边的猫"],
)  # fmt: skip
def test_words_of_sides_are_found(text: str) -> None:
    assert speaks_of_sides(text)


@pytest.mark.parametrize("text", ["a bright light", "a cleft rock", "a copyright notice", "above the table", ""])
def test_other_words_are_not(text: str) -> None:
    assert not speaks_of_sides(text)


def test_only_captions_that_a_sample_may_be_shown_with_count(tmp_path: Path) -> None:
    view = make_told_view(tmp_path, ["a cat"])
    facts = {"caption": "a cat", "short_caption": "left", "text": "right"}
    assert captions_of(view.info, "t5", facts) == ["a cat"] and may_flip(view.info, "t5", facts)
    assert not may_flip(view.info, "t5", {"caption": "a cat on the right"})
    assert not may_flip(view.info, "t5", {"caption": "", "short_caption": "a cat"})  # not known


def test_a_view_whose_captions_speak_of_sides_is_refused(tmp_path: Path) -> None:
    check_flips(make_told_view(tmp_path / "fine", ["a cat", "a dog", ""]), "t5")
    spoken = make_told_view(tmp_path / "spoken", ["a cat", "a dog", "a cat left of a dog", "a cat"])
    with pytest.raises(
        ValueError, match="of 4 samples of view 'told' 1 have captions that speak of left or right, '0002' for"
    ):
        check_flips(spoken, "t5")
    with pytest.raises(ValueError, match="view 'told' does not tell its captions"):
        check_flips(make_told_view(tmp_path / "silent", ["", ""]), "t5")
