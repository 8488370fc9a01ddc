"""The card says what the run recorded, and nothing that it did not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from jobs.model_card import model_card
from jobs.recipe import Recipe
from pipeline.storage import Folder
from tests.tiny_releases import make_recipe, release
from training.loop import train


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return make_recipe(tmp_path_factory.mktemp("world"))


def record(recipe: Recipe) -> None:
    """What build and evaluation leave."""
    dataset, runs = Folder(url=recipe.dataset), Path(recipe.runs)
    settings = {
        "recaption": {
            "engine": {"model": "org/captioner", "revision": "abc"},
            "prompts": [{"name": "dense", "text": "Describe it.\nAll of it."}],
        },
        "clip_filter": {"min_score": 0.2, "min_gain": None},
        "pack_small": {"where": "clip_score >= 0.22 | false"},
    }
    info = json.loads(dataset.read("views/small.json"))
    info["made_by"] = {name: {"version": 1, "identity": {}, "settings": told} for name, told in settings.items()}
    dataset.write("views/small.json", json.dumps(info).encode())
    stage = {"in": 1200, "kept": 1000, "dropped": {"low_clip_score": 150}, "failed": {"http_404": 50}}
    for time, build, stages in (
        ("1", {"job": "build", "recipe": "tiny"}, {"clip_filter": {**stage, "in": 7}}),
        ("2", {"job": "build", "recipe": "tiny"}, {"clip_filter": stage}),
        ("3", {"job": "build", "recipe": "other"}, {"clip_filter": {**stage, "in": 8}}),
        ("4", {"job": "build", "recipe": "tiny"}, {"clip_filter": {"computed": 3}}),
    ):
        dataset.write(f"runs/{time}/run.json", json.dumps({**build, "stages": stages}).encode())
    scores = {"colour": {"raw": 0.7, "shuffled": 0.3, "corrected": 0.567, "interval": [0.5, 0.6]}, "n": 40}
    (runs / "evaluation").mkdir(parents=True)
    (runs / "evaluation" / "evaluation.json").write_text(json.dumps({"oracle": {"tsc": scores}, "gain": {}}))


def test_the_card_says_what_was_recorded(recipe: Recipe) -> None:
    folder = recipe.run_folder("tsc")
    train(replace(recipe.trainings["tsc"], timesteps_per_encoding=2), dataset=Folder(url=recipe.dataset), run=folder)
    record(recipe)
    card = model_card(recipe, "tsc", folder / "release", "diffusers")
    assert card == model_card(recipe, "tsc", folder / "release", "diffusers")
    front = ModelCard(card).data
    assert (front.library_name, front.pipeline_tag, front.tags) == (
        "diffusers", "text-to-image", ["densebridge", "tsc"],
    )  # fmt: skip
    assert front.base_model is None  # folders are no names on the hub
    for line in (
        "# tiny: tsc",
        "trained on 84 samples",
        "Captions by org/captioner@abc, which was asked:\n\n> Describe it.\n> All of it.",
        "CLIP filter: min_score 0.2.",
        "Pictures and texts of `pairs.parquet`.",
        "| small | 24 | 8 px | t5 8 | `clip_score >= 0.22 \\| false` |",
        "| clip_filter | 1,200 | 1,000 | low_clip_score 150 | http_404 50 |",
        "| language model | max length | 8 |",
        "AdamW; weight decay 0.01, betas [0.9, 0.999], clip 1.0, caption drop 0.1, crop center, flip false, weighting plain, ",
        "ema decay 0.9, precision no, seed 3; timesteps uniform, 2 for each encoding of a sample.",
        "| tsc | 40 | 0.567 [0.500, 0.600] |",
    ):
        assert line in card, line
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    first = [line["loss"] for line in log if line["phase"] == 0]
    assert f"| small | 8 px | 48 | 12 | 0.01 constant | {first[0]:.4f} → {first[-1]:.4f} |" in card
    config = recipe.trainings["tsc"]
    phases = tuple(replace(phase, rate=7e-3, samples=120) for phase in config.phases)
    since = replace(config, phases=phases, weight_decay=0.2, seed=8)
    changed = replace(recipe, trainings={**recipe.trainings, "tsc": since})
    assert (
        model_card(changed, "tsc", folder / "release", "diffusers") == card
    )  # of the training, not of the recipe since
    info = json.loads(recipe.folder.read("views/small.json")) | {"manifest_sha256": "another"}
    recipe.folder.write("views/small.json", json.dumps(info).encode())
    assert "| small | 24 |" not in model_card(recipe, "tsc", folder / "release", "diffusers")  # packed anew since


@pytest.mark.parametrize(
    ("model", "revision", "told"),
    [
        ("/models/captioner", None, "captioner"),
        ("/models/captioner", "abc", "captioner"),
        ("org/captioner", None, "org/captioner@main"),
    ],
)
def test_a_captioner_in_a_folder_is_known_by_its_last_part(
    tmp_path: Path, model: str, revision: str | None, told: str
) -> None:
    recipe = make_recipe(tmp_path)
    folder = release(recipe, "tsc")
    info = json.loads(recipe.folder.read("views/small.json"))
    engine, prompts = {"model": model, "revision": revision}, [{"name": "dense", "text": "Describe it."}]
    settings = {"engine": engine, "prompts": prompts}
    info["made_by"] = {"recaption": {"version": 1, "identity": {}, "settings": settings}}
    recipe.folder.write("views/small.json", json.dumps(info).encode())
    card = model_card(recipe, "tsc", folder, "diffusers")
    assert f"Captions by {told}, which was asked:" in card and str(tmp_path) not in card and "/models/" not in card


def test_what_was_not_recorded_is_left_out(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    folder = release(recipe, "lavi")
    Folder(url=recipe.dataset).remove("views/small.json")
    card = model_card(recipe, "lavi", folder, "diffusers")
    assert "## Data" not in card and "## Scores" not in card
    assert "| small | 8 px | 36 | 12 | 0.01 constant |  |" in card
    counts = json.loads((folder / "connector.json").read_text())["files"]
    assert len(counts) == 3 and "parameters (connector " in card and ", language model lora " in card
    assert "through which t5 drives base" in card and str(tmp_path) not in card
    assert (
        "`language_model_lora/` (the language model's, for peft: " in card and "with `model` a `T5EncoderModel`" in card
    )
