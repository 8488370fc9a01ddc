"""The words: dense captions name every fact in 30 to 70 words, and the other kinds name no more than they should."""

from __future__ import annotations

import re

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.shapes import words
from examples.shapes.oracle import read_caption
from examples.shapes.world import NUMBERS, Facts, draw_scenes

SEEDS = st.integers(0, 2**32 - 1)
COUNTS = st.integers(1, 4)
QUICK = settings(max_examples=150, deadline=None, derandomize=True, database=None)


def some_facts(seed: int, count: int = 0) -> Facts:
    """A scene's facts; count 0 leaves the number of objects to chance."""
    shares = tuple(float(k + 1 == count) for k in range(4)) if count else (0.25,) * 4
    return draw_scenes(np.random.default_rng(seed), 1, shares).facts(0)


def said(caption: str) -> tuple[set[object], str, str]:
    facts = read_caption(caption)
    return set(facts.things), facts.ground, facts.texture


def tokens(text: str) -> set[str]:
    return set(re.findall(r"[a-zA-Z]+|[0-9]|[.,:?]", text))


@QUICK
@given(SEEDS, COUNTS)
def test_dense_captions_name_every_fact(seed: int, count: int) -> None:
    facts = some_facts(seed, count)
    caption = words.dense_caption(facts, np.random.default_rng(seed))
    assert 30 <= len(caption.split()) <= 70
    assert said(caption) == (set(facts.things), facts.ground, facts.texture)
    assert NUMBERS[count] in caption.lower()
    assert caption == words.dense_caption(facts, np.random.default_rng(seed))


@QUICK
@given(SEEDS, COUNTS, st.integers(0, len(words.PROMPTS) - 1))
def test_every_style_names_every_fact(seed: int, count: int, style: int) -> None:
    facts = some_facts(seed, count)
    caption = words.styled_caption(facts, style)
    assert 30 <= len(caption.split()) <= 70
    assert said(caption) == (set(facts.things), facts.ground, facts.texture)


def test_no_choice_of_phrases_leaves_30_to_70_words() -> None:
    """The bounds for all captions there are: shortest and longest phrase of each part."""

    def lengths(templates: tuple[str, ...]) -> tuple[int, int]:
        fields = {"number": "two objects", "Number": "Two objects", "place": "top left"}
        names = dict.fromkeys(("are", "texture", "ground", "size", "colour", "shape"), "x")
        counts = [len(t.format(**fields, **names).split()) for t in templates]
        return min(counts), max(counts)

    opening, sentence, closing = (lengths(t) for t in (words.OPENINGS, words.SENTENCES, words.CLOSINGS))
    for count in range(1, 5):
        ending = closing if count < 3 else (0, 0)
        assert opening[0] + count * sentence[0] + ending[0] >= 30
        assert opening[1] + count * sentence[1] + ending[1] <= 70


def test_there_is_a_style_for_every_prompt_and_they_differ() -> None:
    facts = some_facts(3, count=4)
    captions = [words.styled_caption(facts, style) for style in range(len(words.PROMPTS))]
    assert len(set(captions)) == len(words.PROMPTS) == len(words.ORDERS) == len(words.SENTENCES)
    assert all(sorted(order) == [0, 1, 2, 3] for order in words.ORDERS)


@QUICK
@given(SEEDS, COUNTS)
def test_base_captions_never_describe_two_objects_in_full(seed: int, count: int) -> None:
    facts = some_facts(seed, count)
    caption = words.base_caption(facts, np.random.default_rng(seed))
    if count == 1 and "." in caption:
        assert said(caption) == (set(facts.things), facts.ground, facts.texture)
    if count > 1:
        assert len(re.findall(r"corner (holds|there)|is in the|and it is", caption)) == 0


@QUICK
@given(SEEDS, COUNTS)
def test_alt_texts_say_little_and_nothing_false(seed: int, count: int) -> None:
    facts = some_facts(seed, count)
    alt = words.alt_text(facts, np.random.default_rng(seed))
    assert 0 < len(alt.split()) <= 48
    true = {thing.colour for thing in facts.things} | {thing.shape for thing in facts.things}
    named = tokens(alt) & (set(words.COLOURS) | set(words.SHAPES))
    assert named <= true


@QUICK
@given(SEEDS, COUNTS)
def test_the_vocabulary_covers_everything_that_is_said(seed: int, count: int) -> None:
    facts, rng = some_facts(seed, count), np.random.default_rng(seed)
    kinds = (words.dense_caption, words.base_caption, words.weak_list, words.alt_text)
    texts = [kind(facts, rng) for kind in kinds] + [words.ordered_caption(facts), *words.PROMPTS]
    texts += [words.styled_caption(facts, style) for style in range(len(words.PROMPTS))]
    known = set(words.vocabulary())
    assert all(tokens(text) <= known for text in texts), [tokens(text) - known for text in texts]


def test_the_ordered_form() -> None:
    facts = draw_scenes(np.random.default_rng(2), 1, (0, 1)).facts(0)
    form = words.ordered_caption(facts)
    assert form.count("empty") == 2 and form.endswith(f"{facts.texture} {facts.ground} background")
    for t in facts.things:
        assert f"{t.place}: {t.size} {t.colour} {t.shape}" in form
