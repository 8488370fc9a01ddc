"""Sentences: where one ends, and that none is ever lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.sentences import join_sentences, split_sentences, whole_sentences


@pytest.mark.parametrize(
    "sentences",
    [
        ["One.", "Two!", "Three?", "Four"],
        ["It is 3.5 m high.", "So there."],
        ["No end"],
        ["A dog, e.g. a pug, i.e. a small one.", "It sits."],
        ["Mr. Smith and Dr. J. R. Lee stand by St. Mary.", "They wave."],
        ['The sign reads "Stop. Go home."', "The man runs."],
        ["It says “Open. Daily.” next to a door (see fig. 2. Left).", "End."],
        ['"Stop!" he says.', "Then he goes."],
        ["He waits... and then goes.", "Wait…", "Then he stops."],
        ["A U.S. Army truck stands in the U.S.", "The flag waves at 5 p.m.", "It is late."],
        ["1. A red car.", "2. A blue car.", "There are 3.", "The other is gone."],
        ["The sign shows the letter A.", "Below it is a poster of John F. Kennedy."],
        ["A book by J. R. R. Tolkien lies by a letter from J. A. Smith.", "A hand holds it."],
        ["(He waits.)", "The dog barks."],
        ['A 5" pipe.', 'A 6" pipe.', "Done."],
        ["Tools, rags, etc.", "The floor is wet etc. and so on."],
        ["a dog.", "a cat.", "two birds"],  # where all letters are small, they tell nothing
        ["Wow.", ". . The end"],
    ],
)
def test_sentences_end_where_a_reader_says(sentences: list[str]) -> None:
    caption = join_sentences(sentences)
    assert split_sentences(caption) == sentences
    assert split_sentences(f"\n {caption.replace(' ', '  ')} ") == [s.replace(" ", "  ") for s in sentences]


def test_chinese_and_japanese_have_no_space_after_a_sentence() -> None:
    caption = "红色的圆。左上角有一个方块！「好。」他说。"
    sentences = ["红色的圆。", "左上角有一个方块！", "「好。」", "他说。"]
    assert split_sentences(caption) == sentences and join_sentences(sentences) == caption


def test_a_japanese_sentence_goes_on_after_what_it_quotes() -> None:
    caption = "「こんにちは。」と彼は言う。『猫。』は本だ。「犬。」その横に猫がいる。"
    sentences = ["「こんにちは。」と彼は言う。", "『猫。』は本だ。", "「犬。」", "その横に猫がいる。"]
    assert split_sentences(caption) == sentences and join_sentences(sentences) == caption


@pytest.mark.parametrize("blank", ["", "  ", "\n"])
def test_sentences_are_never_none(blank: str) -> None:
    assert split_sentences(blank) == [blank]


texts = st.lists(st.sampled_from([*"aA1.!?…\"'()“”。 \n", "e.g.", "Mr.", "U.S.", "The", "dog", "..."]), max_size=30)


@given(texts.map("".join))
def test_no_letter_is_lost(caption: str) -> None:
    found = split_sentences(caption)
    assert "".join("".join(found).split()) == "".join(caption.split())
    assert caption.strip() == "" or all(s and s == s.strip() for s in found)


def test_a_hostile_caption_comes_to_an_end() -> None:
    """What takes time that grows with the square of the length would run into the tests' limit here."""
    for part in ('"', "(", "a", ".", ". ", "a. ", '"a. ', '"a." ', "(a. ", "A. ", "a.  ", "。", "“。”"):
        assert split_sentences(part * 100_000)


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


@given(texts.map("".join).map(lambda t: " ".join(t.split())))
def test_what_is_whole_is_how_the_text_begins(text: str) -> None:
    whole = whole_sentences(text)
    assert text.startswith(whole) and whole_sentences(whole) == whole
