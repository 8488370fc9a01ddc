"""The shipped weights of the shapes world do what their card says, on held-out data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

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
    assert f"{measured['language_model']['all_right']:.0%}".replace("%", " %") in card
    for side in (16, 24):
        for objects in (1, 2, 3):
            row = measured[f"base_{side}"][f"{objects}_objects"]
            cells = [f"{row[m]:.3f} ({row[f'{m}_shuffled']:.3f})" for m in ("full", "fact", "bag")]
            stated = " | ".join([str(side), str(objects), *cells, f"{row['count']:.3f}"])
            assert f"| {stated} |".replace(" 0.", " .").replace("(0.", "(.") in card


def test_the_card_states_the_sizes() -> None:
    card = {line.split(" | ")[0].strip("| "): line.split(" | ")[2] for line in card_rows()}
    for names, files in (
        ("captioner", ["captioner"]),
        ("clip", ["clip"]),
        ("language_model", ["language_model"]),
        ("base/vae", ["base/vae"]),
        ("base/unet, base/text_encoder", ["base/unet", "base/text_encoder"]),
    ):
        counts = [count_parameters(WEIGHTS / file) for file in files]
        assert card[names] == ", ".join(f"{count / 1e6:.1f} M" for count in counts)


def card_rows() -> list[str]:
    """The lines of the card's table of models."""
    return [line for line in (Path(WEIGHTS) / "README.md").read_text().splitlines() if "| `" in line]


def count_parameters(folder: Path) -> int:
    """Numbers in a folder's weights; tied ones are stored, and count, once."""
    (file,) = folder.glob("*.safetensors")
    return sum(tensor.numel() for tensor in load_file(file).values())
