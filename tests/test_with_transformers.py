"""Captioners through transformers: several families, right counts, one broken picture, memory that runs out."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from examples.shapes.making.measure import held_out
from examples.shapes.making.pictures import photo_jpeg
from examples.shapes.recipe import WEIGHTS
from examples.shapes.words import PROMPTS, styled_caption
from stages.captioning.engine import Answer, not_an_image
from stages.captioning.with_transformers import TransformersConfig, TransformersEngine
from tests.tiny_captioners import make_llava_next, make_qwen

SHAPES = TransformersConfig(model=str(WEIGHTS / "captioner"), dtype="float32", max_new_tokens=110, batch_size=4)
SIZES = [(40, 90), (100, 60), (33, 33), (200, 50)]


def picture(width: int, height: int) -> bytes:
    out = io.BytesIO()
    image = Image.linear_gradient("L").resize((width, height))
    Image.merge("RGB", [image, image.transpose(Image.Transpose.ROTATE_180), image]).save(out, "JPEG")
    return out.getvalue()


@pytest.fixture(scope="module")
def shapes() -> TransformersEngine:
    return SHAPES.load()


@pytest.fixture(scope="module")
def photos() -> tuple[list[bytes], list[str]]:
    """Photos, and the caption that the world's captioner gives each in the style of the first prompt."""
    scenes, rng = held_out(6, (1, 1, 0, 0))
    return [photo_jpeg(scenes, n, rng) for n in range(6)], [styled_caption(scenes.facts(n), 0) for n in range(6)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TransformersConfig:
    """A LLaVA-NeXT that says anything, quickly."""
    folder = tmp_path_factory.mktemp("llava_next")
    make_llava_next(folder)
    return TransformersConfig(model=str(folder), dtype="float32", max_new_tokens=12, batch_size=4)


def test_pictures_are_captioned_in_their_order_whatever_the_batches(
    shapes: TransformersEngine, photos: tuple[list[bytes], list[str]]
) -> None:
    images, wanted = photos
    answers = shapes.captions(images, [PROMPTS[0]] * 6, [0] * 6)
    right = sum(answer.text == caption for answer, caption in zip(answers, wanted, strict=True))
    assert right >= 4, "the captioner is trained to say exactly this"
    assert {a.finish for a in answers} == {"stop"} and all(30 < (a.tokens or 0) < 110 for a in answers)
    assert shapes.captions(images[4:5], [PROMPTS[0]], [0]) == answers[4:5]
    assert shapes.captions([], [], []) == []


def test_a_broken_picture_fails_alone(shapes: TransformersEngine, photos: tuple[list[bytes], list[str]]) -> None:
    images, _ = photos
    whole = shapes.captions(images[:3], [PROMPTS[1]] * 3, [0] * 3)
    broken = [images[0], b"no picture", images[1][:300], images[1], b"", images[2]]
    found = shapes.captions(broken, [PROMPTS[1]] * 6, [0] * 6)
    assert [found[0], found[3], found[5]] == whole
    assert found[1] == found[2] == found[4] == not_an_image() == Answer(status="failed", reason="not_an_image")
    assert shapes.captions([b"x"] * 5, ["?"] * 5, [0] * 5) == [not_an_image()] * 5


def test_an_answer_that_reaches_the_limit_says_so(photos: tuple[list[bytes], list[str]]) -> None:
    (answer,) = replace(SHAPES, max_new_tokens=7).load().captions(photos[0][:1], [PROMPTS[0]], [0])
    assert (answer.finish, answer.tokens) == ("length", 7)


def test_memory_that_runs_out_halves_the_batch(tiny: TransformersConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, asked = tiny.load(), ([picture(*size) for size in SIZES] * 3, ["Describe it."] * 12, [0] * 12)
    wanted = engine.captions(*asked)
    generate, sizes = engine.generate, []

    def small(prepared: Any, seeds: Any) -> list[Answer]:
        sizes.append(len(seeds))
        if len(seeds) > most:
            raise torch.OutOfMemoryError("no memory")
        return generate(prepared, seeds)

    most = 1
    monkeypatch.setattr(engine, "generate", small)
    assert engine.captions(*asked) == wanted
    assert sizes == [4, 2, *[1] * 12], "it learns what fits, once"
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        engine.captions(*asked)


def test_a_draw_depends_on_the_seed_and_on_nothing_else_in_the_batch(tiny: TransformersConfig) -> None:
    engine, images = replace(tiny, temperature=1.0).load(), [picture(*size) for size in SIZES]
    first, second, third = engine.captions(images[:1] * 3, ["Describe it."] * 3, [1, 1, 2])
    assert first == second and first.text != third.text
    assert engine.captions([images[3], images[0]], ["What is it?", "Describe it."], [7, 2])[1] == third
    cold = replace(tiny, temperature=1e-6).load().captions(images[:1], ["?"], [5])
    assert cold == tiny.load().captions(images[:1], ["?"], [0])


def test_a_cache_of_fixed_size_says_the_same(tiny: TransformersConfig) -> None:
    asked = ([picture(*size) for size in SIZES], ["Describe it."] * 4, [0] * 4)
    assert replace(tiny, compile=True).load().captions(*asked) == tiny.load().captions(*asked)


@pytest.mark.parametrize("make", [make_llava_next, make_qwen])
def test_other_families_go_through_the_same_door(make: Callable[[Path], None], tmp_path: Path) -> None:
    """Pictures of different shapes become different numbers of tokens; padded together or alone, the answer is the same."""
    if make is make_qwen:
        pytest.importorskip("torchvision", reason="Qwen-VL's processor needs it, for videos")
    make(tmp_path)
    config = TransformersConfig(model=str(tmp_path), dtype="float32", max_new_tokens=12, batch_size=3)
    engine, images = config.load(), [picture(*size) for size in SIZES]
    prompts = ["Describe it.", "What is on the left, and what behind it?", "?", "Colours!"]
    together = engine.captions(images, prompts, [0] * 4)
    assert [engine.captions([i], [p], [0])[0] for i, p in zip(images, prompts, strict=True)] == together
    assert {a.finish for a in together} == {"length"} and {a.tokens for a in together} == {12}
    assert len({a.text for a in together}) > 1


def test_any_of_the_models_end_tokens_ends_an_answer(tmp_path: Path) -> None:
    make_llava_next(tmp_path)
    config = TransformersConfig(model=str(tmp_path), dtype="float32", max_new_tokens=12)
    images, prompts = [picture(40, 90), picture(60, 60)], ["Describe it.", "Name it."]
    engine = config.load()
    prepared = engine.prepare(images, prompts)
    written = engine._model.generate(**prepared.inputs, max_new_tokens=12, do_sample=False)[:, -12:].tolist()
    third = written[0][2]
    again = config.load()
    again._model.generation_config.eos_token_id = [engine._ends[0], third]
    again._model.generation_config.save_pretrained(tmp_path)
    answers = config.load().captions(images, prompts, [0, 0])
    ends = [row.index(third) + 1 if third in row else 12 for row in written]
    assert [a.tokens for a in answers] == ends and ends[0] <= 3
    assert [a.finish for a in answers] == ["stop" if third in row else "length" for row in written]


def test_what_is_missing_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"needs bitsandbytes: pip install 'densebridge\[quantization\]'"):
        replace(SHAPES, quantization="4bit").load()
    import transformers

    def missing(*_: Any, **__: Any) -> None:
        raise ImportError("Qwen2VLVideoProcessor requires the Torchvision library")

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", missing)
    with pytest.raises(ValueError, match=r"torchvision as a rule: pip install 'densebridge\[vision\]'"):
        SHAPES.load()
    for wrong in ({"batch_size": 0}, {"max_new_tokens": 0}, {"temperature": 3.0}):
        with pytest.raises(ValueError, match="recaption: "):
            replace(SHAPES, **wrong)


def test_only_what_changes_captions_is_in_the_identity() -> None:
    same = ({"batch_size": 9}, {"device": "cpu"}, {"compile": True})
    other = ({"dtype": "bfloat16"}, {"quantization": "8bit"}, {"max_new_tokens": 9}, {"temperature": 0.5})
    assert all(replace(SHAPES, **fields).identity() == SHAPES.identity() for fields in same)  # type: ignore[arg-type]
    assert all(replace(SHAPES, **fields).identity() != SHAPES.identity() for fields in other)  # type: ignore[arg-type]
    assert SHAPES.model not in str(SHAPES.identity()), "a folder is known by its files"
