"""The stage: what it asks whom, how each answer ends as a row, and what its settings change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest

from examples.shapes import recipe as shapes
from examples.shapes.making.measure import held_out
from examples.shapes.making.pictures import photo_jpeg
from examples.shapes.words import PROMPTS, styled_caption
from jobs.plan import PlanOptions
from jobs.recipe import parse
from pipeline.sample import sample_key
from pipeline.stage import Needs
from stages.captioning.engine import Answer, not_an_image
from stages.captioning.guards import GuardsConfig
from stages.captioning.prompts import ATTRIBUTES, DENSE, HINT, TOGETHER
from stages.captioning.with_openai import OpenAIConfig
from stages.captioning.with_transformers import TransformersConfig
from stages.captioning.with_vllm import VLLMConfig
from stages.recaption import Recaption, RecaptionConfig

KEYS = [sample_key(f"https://host.example/{n}.jpg") for n in range(8)]
LONG = "The image shows a brown dog that sits on a green bench. Behind it stands a red wall."
SERVED = OpenAIConfig(model="m", endpoints=("http://host.example/v1",))


class Said:
    """An engine that says what it is told to, and remembers what it was asked."""

    def __init__(self, say: Callable[[str], Answer]) -> None:
        self.say = say
        self.asked: list[tuple[bytes, str, int]] = []

    def captions(self, images: Sequence[bytes], prompts: Sequence[str], seeds: Sequence[int]) -> list[Answer]:
        self.asked += zip(images, prompts, seeds, strict=True)
        return [self.say(prompt) for prompt in prompts]


def captioned(say: Callable[[str], Answer], alts: Sequence[str | None] = (), **fields: Any) -> tuple[list[Any], Said]:
    stage = Recaption(RecaptionConfig(**{"engine": SERVED, "needs": Needs(), "prompts": (DENSE,), **fields}))
    stage.load()
    stage._engine = engine = Said(say)
    columns: dict[str, Any] = {"key": KEYS, "image": [key.encode() for key in KEYS]}
    if "text" in stage.reads:
        columns["text"] = list(alts)
    made = stage.process(pa.table(columns))
    assert set(made) == {*stage.writes.names, "status", "reason", "transient"}
    return [dict(zip(made, row, strict=True)) for row in zip(*made.values(), strict=True)], engine


def answer(text: str, **fields: Any) -> Answer:
    return Answer(**{"text": text, "finish": "stop", "tokens": 20, **fields})


def test_every_answer_becomes_a_row() -> None:
    answers = iter(
        [
            answer(LONG),
            answer(LONG + " And behind", finish="length"),
            answer("I'm sorry, I can't help with that."),
            not_an_image(),
            Answer(status="failed", reason="caption_timeout", transient=True),
            Answer(status="dropped", reason="caption_refused"),
            answer("A dog."),
            answer("A dog sits on " + "the mat and " * 20),
        ]
    )
    rows, _ = captioned(lambda _: next(answers))
    mended = "A brown dog that sits on a green bench. Behind it stands a red wall."
    assert [(r["status"], r["reason"], r["caption"], r["mended"]) for r in rows] == [
        ("kept", None, mended, "opening"),
        ("kept", None, mended, "opening,cut"),
        ("dropped", "caption_refused", "I'm sorry, I can't help with that.", None),
        ("failed", "not_an_image", None, None),
        ("failed", "caption_timeout", None, None),
        ("dropped", "caption_refused", None, None),
        ("dropped", "caption_too_short", "A dog.", None),
        ("dropped", "caption_loops", "A dog sits on " + "the mat and " * 20, None),
    ]
    assert [r["transient"] for r in rows] == [False] * 4 + [True] + [False] * 3
    assert [r["finish"] for r in rows[:4]] == ["stop", "length", "stop", None] and rows[0]["caption_tokens"] == 20
    assert {r["prompt"] for r in rows} == {"dense"} and not any(r["hinted"] or r["short_caption"] for r in rows)


def test_each_sample_is_asked_by_its_key() -> None:
    rows, engine = captioned(lambda _: answer(LONG), prompts=(DENSE, ATTRIBUTES))
    asked = {text: p.name for p in (DENSE, ATTRIBUTES) for text in [p.text]}
    assert [asked[prompt] for _, prompt, _ in engine.asked] == [r["prompt"] for r in rows]
    assert {r["prompt"] for r in rows} == {"dense", "attributes"}
    assert [image for image, _, _ in engine.asked] == [key.encode() for key in KEYS]
    assert len({seed for *_, seed in engine.asked}) == len(KEYS) and all(0 <= s < 2**32 for *_, s in engine.asked)


def test_alt_texts_are_read_only_where_a_prompt_has_a_hint() -> None:
    alts = ["Marie Curie in Paris", None, "IMG_1.jpg", "An <image> of Marie Curie", "", "photo", "x", "a"]
    rows, engine = captioned(lambda _: answer(LONG), alts, prompts=(replace(DENSE, hint=HINT),))
    assert [r["hinted"] for r in rows] == [True, False, False, True] + [False] * 4
    assert "«Marie Curie in Paris»" in engine.asked[0][1] and engine.asked[1][1] == DENSE.text
    assert not any("<image>" in prompt for _, prompt, _ in engine.asked)
    assert Recaption(RecaptionConfig(engine=SERVED, needs=Needs())).reads == ("image",)


def test_a_short_caption_is_asked_for_in_the_same_call() -> None:
    def say(prompt: str) -> Answer:
        return answer("The image shows a dog on a bench." if prompt == DENSE.short else LONG)

    rows, engine = captioned(say, short="asked")
    assert {r["short_caption"] for r in rows} == {"A dog on a bench."} and len(engine.asked) == 2 * len(KEYS)
    assert engine.asked[0][0] is engine.asked[1][0] or engine.asked[0][0] == engine.asked[1][0]
    assert engine.asked[0][2] != engine.asked[1][2]
    rows, _ = captioned(lambda p: answer("Sorry, no." if p == DENSE.short else LONG), short="asked")
    assert {(r["status"], r["short_caption"]) for r in rows} == {("kept", None)}


def test_one_answer_may_hold_both() -> None:
    rows, engine = captioned(lambda _: answer(f"The image shows a dog.\n\n{LONG}"), short="together")
    assert {r["short_caption"] for r in rows} == {"A dog."} and rows[0]["caption"].startswith("A brown dog")
    assert len(engine.asked) == len(KEYS) and engine.asked[0][1].endswith(TOGETHER)
    rows, _ = captioned(lambda _: answer(f"A dog on a bench\n{LONG} And", finish="length"), short="together")
    assert {r["short_caption"] for r in rows} == {"A dog on a bench"} and rows[0]["mended"] == "opening,cut"
    rows, _ = captioned(lambda _: answer(LONG), short="together")
    assert {r["short_caption"] for r in rows} == {None}
    rows, _ = captioned(lambda _: answer(LONG), short="first_sentence")
    assert {r["short_caption"] for r in rows} == {"A brown dog that sits on a green bench."}
    echo = f"{LONG} {DENSE.short}"
    for short, kept in (("none", "kept"), ("first_sentence", "kept"), ("asked", "dropped")):
        rows, _ = captioned(lambda _: answer(echo), short=short)
        assert {r["status"] for r in rows} == {kept}, "the short question counts where it is asked"


def test_the_shapes_worlds_stage_reads_pictures() -> None:
    scenes, rng = held_out(8, (0, 1, 1, 1))
    stage = next(Recaption(s.config) for s in shapes.STAGES if s.name == "recaption")
    stage.load()
    made = stage.process(pa.table({"key": KEYS, "image": [photo_jpeg(scenes, n, rng) for n in range(8)]}))
    styles = [int(key[-8:], 16) % len(PROMPTS) for key in KEYS]
    assert made["prompt"] == [f"style_{s}" for s in styles] and set(made["status"]) == {"kept"}
    right = [c == styled_caption(scenes.facts(n), s) for n, (c, s) in enumerate(zip(made["caption"], styles))]
    assert sum(right) >= 6 and set(made["mended"]) == {None}


def test_what_does_not_change_captions_redoes_none() -> None:
    base = RecaptionConfig(engine=SERVED, needs=Needs())
    same = (
        replace(base, batch_size=3, needs=Needs(cpus=4)),
        replace(base, engine=replace(SERVED, endpoints=("http://other/v1", "http://third/v1"), retries=9, timeout=1.0)),
        replace(base, engine=replace(SERVED, concurrency=1, backoff=0.0, patience=1, api_key_env="KEY")),
        replace(base, prompts=tuple(replace(p, short="Say it in a word.") for p in base.prompts)),
    )
    other = (
        replace(base, engine=replace(SERVED, model="n")),
        replace(base, engine=replace(SERVED, revision="1")),
        replace(base, engine=VLLMConfig(model="m"), needs=Needs(gpus=1)),
        replace(base, engine=TransformersConfig(model="m")),
        replace(base, prompts=base.prompts[::-1]),
        replace(base, short="asked"),
        replace(base, guards=GuardsConfig(min_words=6)),
    )
    ids = {Recaption(config).config_id for config in (base, *same)}
    assert len(ids) == 1 and len(ids | {Recaption(config).config_id for config in other}) == 1 + len(other)


def test_settings_that_cannot_work_are_told() -> None:
    for fields, wrong in (
        ({"prompts": ()}, "at least one prompt"),
        ({"prompts": (DENSE, DENSE)}, "each of another name"),
        ({"needs": Needs(gpus=1)}, r"servers': set needs=Needs\(gpus=0\)"),
        ({"engine": VLLMConfig(model="m", tensor_parallel_size=2), "needs": Needs(gpus=1)}, "needs as many GPUs"),
    ):
        with pytest.raises(ValueError, match=wrong):
            RecaptionConfig(**{"engine": SERVED, "needs": Needs(), **fields})


def test_the_engines_settings_are_flags() -> None:
    argv = ["ella_sd15", "--recaption.engine.batch-size", "4", "--recaption.guards.min-words", "9",
            "--recaption.prompts.0.weight", "3", "--recaption.short", "asked"]  # fmt: skip
    recipe, _ = parse(argv, "plan", PlanOptions, "")
    config = next(s.config for s in recipe.stages if isinstance(s, Recaption))
    assert (config.engine.batch_size, config.guards.min_words, config.prompts[0].weight) == (4, 9, 3)
    assert config.short == "asked" and isinstance(config.engine, TransformersConfig)
