"""What is exported is what was trained, in ELLA's file and in a folder that diffusers loads; what cannot be is told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from jobs.export import ExportOptions, export, local_models, main, write_ella
from jobs.recipe import Recipe
from tests.tiny_denoisers import make_pixart
from tests.tiny_releases import PROMPTS, make_recipe, release
from tests.training_fixtures import tsc_config
from training.bridge import Bridge
from training.checkpoints import State
from training.configuration import DenoiserConfig, LanguageModelConfig, LoRAConfig
from training.ella import load_ella
from training.lora import PIXART, UNET
from training.releases import load_bridge, write_release


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """With a release of each of its trainings."""
    made = make_recipe(tmp_path_factory.mktemp("world"))
    for training in made.trainings:
        release(made, training)
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tokens_of(recipe: Recipe, training: str, bridge: Bridge) -> torch.Tensor:
    language_model = replace(recipe.trainings[training].language_model, lora=None).load()
    hidden, mask = language_model.encode(language_model.tokenize(PROMPTS))
    with torch.no_grad():
        return bridge(hidden, mask, torch.tensor([3.0, 900.0])).tokens


def test_ellas_file_holds_the_connector(recipe: Recipe, tmp_path: Path) -> None:
    options = ExportOptions(to="ella", out=tmp_path / "one")
    assert [path.name for path in export(recipe, options)] == ["README.md", "ella-tsc.safetensors"]
    loaded = load_ella(tmp_path / "one" / "ella-tsc.safetensors", tsc_config())
    config = recipe.trainings["tsc"]
    released = load_bridge(
        recipe.run_folder("tsc") / "release",
        language_model=config.language_model.load(),
        denoiser=config.denoiser.load(with_vae=False),
    )
    assert torch.equal(tokens_of(recipe, "tsc", loaded), tokens_of(recipe, "tsc", released.half().float()))
    card = (tmp_path / "one" / "README.md").read_text()
    assert "ELLA(time_channel=8, time_embed_dim=8, width=16, layers=2, heads=2, num_latents=4, input_dim=16)" in card
    assert "without sight of pads" in card and "diffusers" not in card.split("---")[1]


def test_the_diffusers_folder_draws_as_the_release(recipe: Recipe, tmp_path: Path) -> None:
    for training in recipe.trainings:
        one, two = tmp_path / f"{training}_one", tmp_path / f"{training}_two"
        for out in (one, two):
            files = export(recipe, ExportOptions(training=training, out=out))
        names = {path.relative_to(two).as_posix() for path in files}
        theirs = {"pytorch_lora_weights.safetensors", "language_model_lora/adapter_model.safetensors"}
        assert "README.md" in names and names & theirs == (theirs if training == "lavi" else set())
        assert contents(one) == contents(two)
        config = recipe.trainings[training]
        language_model, denoiser = config.language_model.load(), config.denoiser.load(with_vae=False)
        bridge = load_bridge(recipe.run_folder(training) / "release", language_model=language_model, denoiser=denoiser)
        pipeline = DiffusionPipeline.from_pretrained(
            str(one), custom_pipeline=str(one / "pipeline.py"), trust_remote_code=True
        )
        noisy, times = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3.0, 900.0])
        with torch.no_grad():
            ours = bridge(*language_model.encode(language_model.tokenize(PROMPTS)), times)
            other = pipeline.attached.language_model
            theirs = pipeline.attached.bridge(*other.encode(other.tokenize(PROMPTS)), times)
            assert torch.equal(ours.tokens, theirs.tokens)
            pipeline.attached.detach()  # the network alone
            drawn = pipeline.unet(noisy, times, theirs.tokens, encoder_attention_mask=theirs.mask).sample
            assert torch.equal(denoiser.predict(noisy, times, ours), drawn)


def test_what_cannot_be_exported_is_told(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ELLA's code knows the tsc alone, this connector is a lavi"):
        export(recipe, ExportOptions(training="lavi", to="ella", out=tmp_path / "a"))
    other = recipe.run_folder("lavi") / "release"
    with pytest.raises(ValueError, match="holds another connector than training 'tsc'"):
        export(recipe, ExportOptions(release=other, out=tmp_path / "a"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    with pytest.raises(FileExistsError, match="full is not empty: name another folder with --out"):
        export(recipe, ExportOptions(out=tmp_path / "full"))
    with pytest.raises(FileNotFoundError, match="run `densebridge train` for training 'tsc' first"):
        export(replace(recipe, runs=str(tmp_path / "none")), ExportOptions(out=tmp_path / "a"))
    assert not (tmp_path / "a").exists() and contents(tmp_path / "full") == {"mine": b""}


@pytest.mark.parametrize(
    ("part", "changes", "problem"),
    [
        ("language_model", {"max_length": 9}, "language_model.max_length is 8 there and 9 here"),
        ("language_model", {"layers": "mean"}, "language_model.layers is 'last' there and 'mean' here"),
        ("denoiser", {"lora": LoRAConfig(targets=UNET, rank=2)}, r"denoiser\.lora is None there and \{.*\} here"),
    ],
)
def test_a_recipe_that_changed_since_is_refused(
    recipe: Recipe, tmp_path: Path, part: str, changes: dict[str, Any], problem: str
) -> None:
    config = recipe.trainings["tsc"]
    changed = replace(config, **{part: replace(getattr(config, part), **changes)})
    since = replace(recipe, trainings={**recipe.trainings, "tsc": changed})
    for to in ("diffusers", "ella"):
        with pytest.raises(ValueError, match=rf"otherwise than recipe 'tiny' says: {problem}.* it was trained with$"):
            export(since, ExportOptions(to=to, out=tmp_path / "a"))
    beside = replace(recipe, trainings={"tsc": replace(config, beside=config.language_model)})
    with pytest.raises(ValueError, match=r"beside is None there and \{.* here: give the flags it was trained with"):
        export(beside, ExportOptions(out=tmp_path / "a"))
    assert not (tmp_path / "a").exists()


def test_features_that_ellas_code_does_not_make_are_refused(recipe: Recipe, tmp_path: Path) -> None:
    config = recipe.trainings["tsc"]
    deeper = replace(config, language_model=replace(config.language_model, layers="mean"))
    other = replace(recipe, runs=str(tmp_path / "runs"), trainings={"tsc": deeper})
    release(other, "tsc")
    with pytest.raises(ValueError, match="ELLA's code knows no language_model with layers 'mean'"):
        export(other, ExportOptions(to="ella", out=tmp_path / "a"))


def test_a_connector_trained_beside_another_encoder_does_not_fit_ellas_file(recipe: Recipe, tmp_path: Path) -> None:
    config = recipe.trainings["tsc"]
    with pytest.raises(ValueError, match=r"no place for the tokens of training\.beside"):
        write_ella(replace(config, beside=config.language_model), {}, tmp_path)


def test_no_path_of_this_machine_goes_out_but_to_load_by(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr("jobs.export.parse", lambda *_, **__: (recipe, ExportOptions(training="lavi", out=out)))
    assert main(["tiny"]) == 0
    config = recipe.trainings["lavi"]
    folders = [config.denoiser.model, config.language_model.model]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"{out} loads on this machine alone, for it names what lies here: {', '.join(folders)}"
    root = str(Path(folders[0]).parents[1])
    found = [path.relative_to(out).as_posix() for path in out.rglob("*.*") if root.encode() in path.read_bytes()]
    assert found == ["release/models.json"]
    hub = replace(config, denoiser=DenoiserConfig(model="org/base"), language_model=LanguageModelConfig(model="org/t5"))
    assert local_models(hub) == []


def test_the_lora_of_a_network_without_a_loader_is_pefts(recipe: Recipe, tmp_path: Path) -> None:
    config = recipe.trainings["lavi"]
    pixart = DenoiserConfig(model=str(make_pixart(tmp_path / "pixart")), lora=LoRAConfig(targets=PIXART, rank=2))
    other = replace(recipe, runs=str(tmp_path / "runs"), trainings={"lavi": replace(config, denoiser=pixart)})
    release(other, "lavi")
    names = {
        path.relative_to(tmp_path / "out").as_posix() for path in export(other, ExportOptions(out=tmp_path / "out"))
    }
    assert "denoiser_lora/adapter_model.safetensors" in names and "pytorch_lora_weights.safetensors" not in names
    card = (tmp_path / "out" / "README.md").read_text()
    assert "load_lora_weights" not in card
    assert 'PeftModel.from_pretrained(pipeline.transformer, f"{FOLDER}/denoiser_lora")' in card


def test_a_lora_beside_a_tsc_does_not_fit_ellas_file(recipe: Recipe, tmp_path: Path) -> None:
    facts = json.loads((recipe.run_folder("tsc") / "release" / "connector.json").read_text())
    bridge = Bridge(tsc_config(), denoiser_lora={"conv.lora_A": torch.nn.Linear(2, 2)})
    write_release(tmp_path / "run", facts, State(), bridge.state_dict(), None)
    with pytest.raises(ValueError, match="a connector alone, this release a denoiser_lora too"):
        export(recipe, ExportOptions(release=tmp_path / "run" / "release", to="ella", out=tmp_path / "out"))


def test_the_command_names_its_files(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("jobs.export.parse", lambda *_, **__: (recipe, ExportOptions(to="ella", out=tmp_path / "out")))
    assert main(["tiny"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        str(tmp_path / "out" / "README.md"),
        str(tmp_path / "out" / "ella-tsc.safetensors"),
    ]
