"""What a run is put together from is checked before the first step, and each model is told what is its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.captions import TokenizerConfig, tokenizer_id
from pipeline.storage import Folder
from tests.tiny_denoisers import POOLED_WIDTH, make_sana, make_sdxl
from tests.tiny_language_models import WIDTH, make_language_model
from tests.training_fixtures import LENGTH, make_view
from training import loop
from training.batches import Batches
from training.configuration import DenoiserConfig, LanguageModelConfig, LoRAConfig, Phase, TrainingConfig
from training.connectors import LaViConfig, TSCConfig
from training.encoding import encode
from training.parts import Parts, batch_config, facts_of, load_parts
from training.processes import start_processes
from training.releases import load_bridge
from training.step import losses_of
from training.views import open_views

TSC = TSCConfig(
    in_width=WIDTH, width=WIDTH, blocks=1, heads=2, queries=4, time_channels=8, time_width=8, pooled_width=POOLED_WIDTH
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parts")
    for name in ("t5", "clip"):
        make_language_model(root / name, name)
    make_language_model(root / "wide", "clip", width=2 * WIDTH)
    make_sdxl(root / "sdxl", width=WIDTH)
    make_sana(root / "sana", width=WIDTH)
    clip = TokenizerConfig(name="clip", model=str(root / "clip"), max_length=LENGTH)
    make_view(root / "dataset", "small", 8, tokenizer_id(str(root / "t5"), None), others=[clip])
    return root


def language_model(world: Path, name: str, **changes: object) -> LanguageModelConfig:
    return LanguageModelConfig(model=str(world / name), tokenizer=name, max_length=LENGTH, **changes)  # type: ignore[arg-type]


def config_of(world: Path, **changes: Any) -> TrainingConfig:
    settings = {
        "connector": TSC,
        "language_model": language_model(world, "t5"),
        "denoiser": DenoiserConfig(model=str(world / "sdxl")),
        "beside": language_model(world, "clip"),
        "phases": (Phase(view="small", resolution=8, samples=8, batch=4, micro_batch=4),),
    }
    return TrainingConfig(**{**settings, **changes})


def parts_of(config: TrainingConfig) -> Parts:
    return load_parts(config, start_processes(config))


def first_losses(world: Path, config: TrainingConfig, parts: Parts) -> tuple[Any, Any]:
    """(losses, weights, bad) of the first batch, and the batch."""
    views = open_views(config, Folder(url=str(world / "dataset")))[0]
    with Batches(views, batch_config(config, 0, parts)) as batches:
        batch = next(batches)
    found = encode(parts, batch, "draws")
    return (losses_of(parts, found, "draws"), found.weights, found.slots.unusable()), batch


@pytest.mark.parametrize("kind", ["sdxl", "sana"])
def test_the_denoiser_is_told_its_times_sizes_and_masks(
    world: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    connector = TSC if kind == "sdxl" else replace(TSC, pooled_width=None)
    config = config_of(world, connector=connector, denoiser=DenoiserConfig(model=str(world / kind)))
    parts, told = parts_of(config), []
    predict = parts.denoiser.predict
    monkeypatch.setattr(parts.denoiser, "predict", lambda *given: told.append(given) or predict(*given))
    _, batch = first_losses(world, config, parts)
    ((_, times, conditioning, sizes),) = told
    assert torch.equal(times, parts.denoiser.levels.times[batch.timesteps]) and torch.equal(sizes, batch.sizes)
    beside = torch.tensor([[n < len(ids) for n in range(LENGTH)] for ids in batch.beside_ids])
    assert torch.equal(conditioning.mask[:, :4], torch.ones(4, 4, dtype=torch.bool))
    assert torch.equal(conditioning.mask[:, 4:], beside) and conditioning.tokens.shape == (4, 4 + LENGTH, WIDTH)


@pytest.mark.parametrize("which", ["language_model", "beside"])
def test_what_overflows_in_either_text_model_weighs_nothing_and_is_told(world: Path, which: str) -> None:
    config = config_of(world, caption_drop=0.0)
    parts = parts_of(config)
    (_, _, bad), batch = first_losses(world, config, parts)
    assert bad == []
    ids = batch.ids if which == "language_model" else batch.beside_ids
    others = np.concatenate(ids[1:])
    rare = next(int(token) for token in ids[0] if token not in others)
    with torch.no_grad():
        getattr(parts, which).module.get_input_embeddings().weight[rare] = torch.inf
    (losses, weights, bad), _ = first_losses(world, config, parts)
    assert weights.tolist() == [0, 1, 1, 1] and bool(losses[1:].isfinite().all())
    assert [one.position for one in bad] == [0] and "not finite" in bad[0].reason


def test_the_weighting_counts(world: Path, tmp_path: Path) -> None:
    dataset = Folder(url=str(world / "dataset"))
    releases = [
        loop.train(config_of(world, weighting=kind, gamma=0.1), dataset=dataset, run=tmp_path / kind).release
        for kind in ("plain", "min_snr", "debiased")
    ]
    assert len({(release / "connector.safetensors").read_bytes() for release in releases}) == 3


def test_what_does_not_fit_is_refused_before_the_first_step(world: Path, tmp_path: Path) -> None:
    dataset = Folder(url=str(world / "dataset"))
    sana = {"denoiser": DenoiserConfig(model=str(world / "sana")), "connector": replace(TSC, pooled_width=None)}
    for changes, problem in (
        ({**sana, "weighting": "min_snr"}, "weighting 'min_snr' is for epsilon and v_prediction, the denoiser here is a flow"),
        ({**sana, "weighting": "debiased"}, "weighting 'debiased' is for epsilon and v_prediction"),
        ({"connector": replace(TSC, pooled_width=None)}, "connector.pooled_width is None, the models here want"),
        ({"beside": replace(language_model(world, "wide"), tokenizer="clip", tokenizer_model=str(world / "clip"))},
         f"training.beside gives tokens of width {2 * WIDTH}"),
        ({"beside": language_model(world, "clip", instruction="Draw ")}, "were made with instruction ''"),
        ({"beside": replace(language_model(world, "clip"), tokenizer="other")}, "has no tokens 'other'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=problem):
            loop.train(config_of(world, **changes), dataset=dataset, run=tmp_path)


def test_a_release_names_its_text_models_and_their_tokenizers(world: Path, tmp_path: Path) -> None:
    config = config_of(world)
    release = loop.train(config, dataset=Folder(url=str(world / "dataset")), run=tmp_path / "run").release
    own, denoiser, clip = config.language_model.load(), config.denoiser.load(), language_model(world, "clip").load()
    load_bridge(release, language_model=own, denoiser=denoiser, beside=clip)
    with pytest.raises(ValueError, match="beside"):
        load_bridge(release, language_model=own, denoiser=denoiser)
    swapped = tmp_path / "tokenizer"
    own.tokenizer.bare.save_pretrained(swapped)
    path = swapped / "tokenizer.json"
    path.write_text(path.read_text().replace("red", "der"))
    other = replace(config.language_model, tokenizer_model=str(swapped)).load()
    with pytest.raises(ValueError, match=r"language_model.tokenizer is"):
        load_bridge(release, language_model=other, denoiser=denoiser, beside=clip)


def test_where_dropout_draws_by_micro_batch_a_resumed_run_keeps_it(world: Path) -> None:
    lora = LoRAConfig(targets=(r".*SelfAttention\.[qv]",), rank=2, dropout=0.1)
    for changes, kept in (({}, False), ({"language_model": language_model(world, "t5", lora=lora)}, True)):
        config = config_of(world, **changes)
        views = open_views(config, Folder(url=str(world / "dataset")))
        assert ("micro_batch" in facts_of(config, views, parts_of(config))["phases"][0]) is kept
    lavi = LaViConfig(in_width=WIDTH, width=WIDTH, pooled_width=POOLED_WIDTH, dropout=0.1)
    assert "micro_batch" in facts_of(config_of(world, connector=lavi), views, parts_of(config))["phases"][0]
