"""Where sentences end, and where a caption that was cut is cut again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.captioning.sentences import sentences, whole_sentences


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("It is 3.5 m high. So there.", ["It is 3.5 m high.", "So there."]),
        ("Fruit, e.g. apples, lies there. Dr. Smith eats.", ["Fruit, e.g. apples, lies there.", "Dr. Smith eats."]),
        ('A sign says "Stop." It is red.', ['A sign says "Stop."', "It is red."]),
        ("J. R. Tolkien sits. He reads.", ["J. R. Tolkien sits.", "He reads."]),
        (
            "There are pears, plums etc. Behind them is a wall.",
            ["There are pears, plums etc.", "Behind them is a wall."],
        ),
        ("It says Yahoo. in purple... or so. End.", ["It says Yahoo. in purple...", "or so.", "End."]),
        ("A cat (black.) A dog.", ["A cat (black.)", "A dog."]),
        ("一只猫。 一只狗", ["一只猫。", "一只狗"]),
        ("No end", ["No end"]),
        ("", []),
    ],
)
def test_sentences(text: str, found: list[str]) -> None:
    assert sentences(text) == found


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("A red cube. It lies on", "A red cube."),
        ("A red cube. It weighs 3.", "A red cube."),  # of 3.5, perhaps
        ("A red cube. It has spots, e.g.", "A red cube."),
        ("A red cube that lies", ""),
        ("A red cube that is 3.5 m high", ""),
        ("Mr. Smith stands on", ""),
        ("A red cube. It is large.", "A red cube. It is large."),
        ("", ""),
    ],
)
def test_a_text_that_was_cut_ends_with_a_whole_sentence(text: str, whole: str) -> None:
    assert whole_sentences(text) == whole


@given(st.text(alphabet="aA .!?3e\"',()", max_size=60).map(lambda t: " ".join(t.split())))
def test_sentences_lose_nothing(text: str) -> None:
    assert "".join(" ".join(sentences(text)).split()) == "".join(text.split())
    assert text.startswith(whole_sentences(text))
