"""The shipped weights of the shapes world do what their card says, on held-out data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.shapes.make_models import WEIGHTS
from examples.shapes.making.measure import (
    measure_base,
    measure_captioner,
    measure_clip,
    measure_language_model,
    measure_vae,
)


def test_the_weights_are_small_and_safe() -> None:
    files = [p for p in WEIGHTS.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 25_000_000
    assert {p.suffix for p in files} <= {".safetensors", ".json", ".txt", ".md", ".jinja"}


def test_captions_hold_nine_tenths_of_the_facts() -> None:
    assert measure_captioner(WEIGHTS / "captioner", count=64)["all"] >= 0.90


def test_clip_tells_matched_from_random() -> None:
    assert measure_clip(WEIGHTS / "clip", count=150)["auc"] >= 0.97


def test_the_language_model_binds_what_it_reads() -> None:
    assert measure_language_model(WEIGHTS / "language_model", count=48)["places_right"] >= 0.95


def test_objects_survive_the_vae() -> None:
    assert min(measure_vae(WEIGHTS / "base", count=100).values()) >= 0.97


@pytest.mark.parametrize("side", [16, 24])
def test_the_base_draws_one_object_and_does_not_bind_several(side: int) -> None:
    found = measure_base(WEIGHTS / "base", side, count=48)
    assert found["1_objects"]["full"] >= 0.80 and found["1_objects"]["full_shuffled"] < 0.05
    assert found["2_objects"]["full"] < found["1_objects"]["full"] - 0.2


def test_the_card_states_what_was_measured() -> None:
    card = (Path(WEIGHTS) / "README.md").read_text()
    measured = json.loads((Path(WEIGHTS) / "measured.json").read_text())
    assert f"{measured['captioner']['all']:.3f}" in card and f"{measured['clip']['auc']:.3f}" in card
