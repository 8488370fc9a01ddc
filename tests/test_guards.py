"""What counts as a caption: answers such as LLaVA, Qwen-VL and CogVLM give, good and bad."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.shapes.words import PROMPTS, styled_caption
from examples.shapes.world import draw_scenes
from stages.captioning.guards import GuardsConfig, Judged, foreign_share, judge, leaks, loops, runs, words
from stages.captioning.prompts import DENSE, HINT, TEMPLATES

GOOD = (
    "A wooden desk stands against a white wall. On the left side of the desk there is a silver laptop, and next to it a "
    "blue ceramic mug. A grey cat with green eyes sits on a stack of books on the right, looking at the camera."
)
TOLD = tuple(told for p in TEMPLATES for told in replace(p, hint=HINT).own_words("none"))
LOOP = "A man stands on a beach. " + "He is wearing a red shirt and a black hat. " * 12


def judged(text: str, finish: str = "stop", asked: tuple[str, ...] = (), **config: object) -> Judged:
    return judge(text, finish, GuardsConfig(**config), asked)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("I'm sorry, but I can't help with identifying people in images.", "caption_refused"),
        ("I’m sorry, I cannot assist with that request.", "caption_refused"),
        ("Sorry, I can't describe this image.", "caption_refused"),
        ("I am unable to view images. Please upload it again.", "caption_refused"),
        ("I cannot see any image attached to your message.", "caption_refused"),
        ("I don't see an image here.", "caption_refused"),
        ("There is no image provided. Please share the picture.", "caption_refused"),
        ("As an AI language model, I can describe scenes, but not people.", "caption_refused"),
        ("Unfortunately, I am not able to process this picture.", "caption_refused"),
        ("The person may be famous, but I'm unable to assist with naming them.", "caption_refused"),
        *(
            (refusal, "caption_refused")
            for refusal in (
                "I am sorry, but I cannot describe people in this image.",
                "I am sorry, I am not able to identify the person.",
                "It looks like you haven't provided an image.",
                "I'm an AI language model and do not see pictures.",
                "The image is not visible, so I cannot describe what it shows.",
                "I don't feel comfortable describing the woman in this picture.",
                "Unable to process the image because it is too large.",
                "Please provide the image that you want described.",
                "**I can’t recognize real people in photographs.**",
                "\"I'm sorry, but I can't help with that request.\"",
            )
        ),
        (LOOP, "caption_loops"),
        ("A market with fruit: " + "apples, pears, " * 9, "caption_loops"),
        ("A sign with many words " + "the " * 30, "caption_loops"),
        ("A dog", "caption_too_short"),
        ("", "caption_too_short"),
        ("**", "caption_too_short"),
        ("这张图片显示了一只棕色的狗坐在长椅上,背景是红砖墙。", "caption_wrong_language"),
        ("На изображении показана большая коричневая собака.", "caption_wrong_language"),
        ("ASSISTANT: A dog on a bench in a park near a lake.", "caption_leaks_prompt"),
        ("A dog on a bench. USER: Describe this image. ASSISTANT: A dog.", "caption_leaks_prompt"),
        ("A dog sits on a bench.\nUSER: And what else is there?", "caption_leaks_prompt"),
        ("A dog sits on a bench. ### Response: A dog sits.", "caption_leaks_prompt"),
        ("A dog on a green bench in a park.<|im_end|>", "caption_leaks_prompt"),
        ("[INST] A dog on a green bench in a park.", "caption_leaks_prompt"),
    ],
)
def test_what_is_no_caption_says_why_and_keeps_its_words(text: str, reason: str) -> None:
    assert judged(text) == Judged(caption=text, reason=reason)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        "The shop window is so dark that you cannot see the picture behind it. A man stands in front.",
        "A neon sign reads TAXI TAXI TAXI above a wet street at night.",
        "A red bus, a blue bus and a green bus stand in a row in front of a very, very tall tower.",
        "A café in Kraków, with a façade in señorial style and a sign that says 咖啡.",
        '"Sorry, we\'re closed" reads a hand-painted sign that hangs in a door.',
        "\"I can't keep calm, it's my birthday\" is printed on a pink shirt.",
        "‘I can’t keep calm’ is printed on a pink shirt of a boy.",
        'A vintage record cover with the title "I Can\'t Help Falling in Love" lies on a table.',
        'The text on the mug says "I can\'t see without coffee" in white letters.',
        "A robot is labelled as an AI assistant on a poster with blue letters.",
        "A slide titled GPT-4 as a large language model hangs over a desk.",
        "Please share the road reads a yellow sign beside a photo shop.",
        "No picture is attached to the cork board, which hangs over a desk.",
        "\"I'm sorry, Dave. The rest of the line on the poster is torn off.",
        "The objects on the left, on the right in the corner, are two chairs.",
        "A dog sits on the left. On the right in front of a wall stands a cat.",
        "Two cups show where they are in relation to each other by their shadows.",
        "A scoreboard over the field shows 0 0 0 0 0 0 in red lights.",
        "A wall that somebody painted red, red, red, red, red, red from floor to ceiling stands behind a man.",
        "The lyrics on the sleeve read New York, New York, New York, New York above a drawing of the skyline of the town.",
        'A page on which a child wrote "stop stop stop stop stop stop stop stop stop stop stop" lies on a wooden table.',
        "A book cover reads Being Human: A Short History in white letters.",
        "A screenshot with the fields USER: admin and a grey button below.",
        "A page of code with the tags <s> and </s> stands on a screen.",
        "A woman who apologizes stands on the left; on the right a man says he can't help her.",
    ],
)
def test_a_caption_stays_as_it_is(text: str) -> None:
    assert judged(text, asked=TOLD) == Judged(caption=text)


@pytest.mark.parametrize(
    ("text", "finish", "caption", "mended"),
    [
        (f"The image shows a dog. {GOOD}", "stop", f"A dog. {GOOD}", ("opening",)),
        (f"In this image, the image shows a dog. {GOOD}", "stop", f"A dog. {GOOD}", ("opening",)),
        (f"{GOOD} Behind it hangs", "length", GOOD, ("cut",)),
        (f"{GOOD} It is 2.", "length", GOOD, ("cut",)),
        (f"This image depicts a dog. {GOOD} The", "length", f"A dog. {GOOD}", ("opening", "cut")),
        ("### Description\n\n**Dog**:\n- A brown dog sits.\n- It looks at a ball.", "stop",
         "Dog: A brown dog sits. It looks at a ball.", ("markdown", "opening")),
        ("- A red car\n- A blue house", "stop", "A red car. A blue house", ("markdown",)),
        ("1. A red car\n2. A blue house.\n3. A tree", "stop", "A red car. A blue house. A tree", ("markdown",)),
        ("# A yard\nA red car stands there.", "stop", "A yard: A red car stands there.", ("markdown",)),
        ("### Description: A red car stands in a yard.", "stop", "A red car stands in a yard.", ("markdown", "opening")),
        ("A shirt bears a number\n10. The ball lies before it.", "stop",
         "A shirt bears a number 10. The ball lies before it.", ()),
        ("The method __init__ stands on a screen.", "stop", "The method __init__ stands on a screen.", ()),
        ("A __very red__ car stands in a __Yard__.", "stop", "A very red car stands in a Yard.", ("markdown",)),
        ("  A dog\n\nruns over a green field. ", "stop", "A dog runs over a green field.", ()),
    ],
)  # fmt: skip
def test_what_can_be_mended_is_and_that_is_recorded(
    text: str, finish: str, caption: str, mended: tuple[str, ...]
) -> None:
    assert judged(text, finish) == Judged(caption=caption, mended=mended)


def test_half_a_sentence_is_no_caption() -> None:
    assert judged("A very long sentence that goes on and on and", "length").reason == "caption_cut"
    assert judged("A dog runs. A very long sentence that", "length").reason == "caption_too_short"


def test_settings_are_heeded() -> None:
    assert judged("A dog", min_words=2).reason is None
    assert judged("The image shows a brown dog.", openings="kept").caption == "The image shows a brown dog."
    assert judged("一只棕色的狗坐在长椅上。", script="any").reason is None
    assert judged(LOOP, max_loops=1.0).reason == "caption_loops"  # twelve times on end is one whatever the share
    for wrong in ({"min_words": 0}, {"max_loops": 0.0}, {"loop_words": 0}):
        with pytest.raises(ValueError, match="guards need"):
            GuardsConfig(**wrong)  # type: ignore[arg-type]


def test_languages_are_told_apart_where_one_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert GuardsConfig().load_language() is None
    config = GuardsConfig(language="en")
    language = config.load_language()
    german = "Ein großer brauner Hund sitzt auf einer hölzernen Bank vor einer roten Mauer."
    assert judge(german, "stop", config, language=language).reason == "caption_wrong_language"
    assert judge(GOOD, "stop", config, language=language).reason is None
    short = "Vier Tassen"
    assert judge(short, "stop", replace(config, min_words=1), language=language).reason is None, "too short to tell"
    with pytest.raises(ValueError, match=r"guards.language='qq' is none of py3langid's: .* de .* en "):
        GuardsConfig(language="qq").load_language()
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    with pytest.raises(ValueError, match=r"needs py3langid: pip install 'densebridge\[language\]'"):
        config.load_language()


def test_the_prompt_is_leaked_by_its_words_but_not_by_the_alt_texts() -> None:
    asked = (*DENSE.own_words("none"), *HINT.split("{alt}"))
    told = "It was published with the text of a man. The picture was published with the text about Paris."
    assert leaks(told, asked)
    assert leaks("The main objects and their surroundings with their colours and textures and where they are.", asked)
    assert leaks("Describe this image in about fifty words. A dog sits.", asked)
    assert not leaks("Marie Curie in her laboratory at the University of Paris in 1911 with flasks.", asked)
    assert not leaks(GOOD, asked)


def test_measures() -> None:
    assert loops("a b c d e f", 6) == 0.0 and loops("", 6) == 0.0
    assert loops("a b a b a b", 2) == pytest.approx(3 / 5)
    assert runs("x " * 10) and not runs("x " * 9) and runs("x y " * 10) and not runs("x y " * 9)
    assert not runs("7 " * 40) and not runs("A sign: " + "“x x x x” " * 40)
    assert runs("one two three four " * 4) and not runs("one two three four " * 3)
    assert foreign_share("abc где") == 0.5 and foreign_share("123") == foreign_share("é") == 0.0
    assert words("It's a well-known 咖啡 shop.") == ["It's", "a", "well-known", "咖", "啡", "shop"]


def test_a_language_is_one_that_can_pass() -> None:
    for language, wrong in (("english", "two small letters"), ("EN", "two small letters"), ("ja", "guards.script=any")):
        with pytest.raises(ValueError, match=wrong):
            GuardsConfig(language=language)
    assert GuardsConfig(language="ja", script="any").load_language() is not None


@pytest.mark.parametrize("piece", ["\n", "- ", "1. ", "__", "**", "# ", '"', "'", "a__ ", "USER: ", "x\n", "sorry "])
def test_long_answers_are_judged_in_linear_time(piece: str) -> None:
    assert judged(piece * 10_000).caption is not None
    assert judged(f"{GOOD} {piece * 10_000} end", openings="kept").caption is not None


def test_the_shapes_worlds_captions_pass() -> None:
    """Their sentences are all alike, which is near to a loop and none."""
    rng = np.random.default_rng(5)
    scenes = draw_scenes(rng, 200, (1, 1, 1, 1))
    for n in range(200):
        caption = styled_caption(scenes.facts(n), n % len(PROMPTS))
        assert judged(caption, asked=PROMPTS, openings="kept") == Judged(caption=caption)


def test_marks_do_not_hide_what_is_repeated() -> None:
    assert judged("a dog \n 1. \n 1. a dog a dog a dog").reason == "caption_loops"


PIECES = st.sampled_from(
    ["The image shows", "In this image,", "we can see", "a dog", "1.", "- ", "**", "#", "\n", "Sure!", "Caption:", "e.g.",
     "It is 3.5 m.", "red. ", "ß", "ŉ", "...", '"', "The", "runs on", "a small table", "。", "A picture of"]
)  # fmt: skip


@given(st.lists(PIECES, max_size=14).map(" ".join), st.sampled_from(["stop", "length"]))
def test_mending_is_done_once_and_never_adds(text: str, finish: str) -> None:
    first = judged(text, finish)
    if first.reason:
        assert first.caption == text
        return
    assert len(words(first.caption)) >= 5 and len(first.caption) <= len(text)
    assert judged(first.caption) == Judged(caption=first.caption)
