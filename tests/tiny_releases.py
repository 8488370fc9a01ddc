"""Releases of tiny models with drawn weights, and the recipe that they are of."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import torch

from jobs.recipe import Recipe
from stages.source import Source
from tests.training_fixtures import WIDTH, language_model_config, make_world, training_config
from training.bridge import Bridge
from training.checkpoints import State
from training.configuration import DenoiserConfig, LoRAConfig, Phase
from training.connectors import LaViConfig
from training.lora import T5, UNET
from training.parts import Parts, facts_of
from training.releases import write_release
from training.views import open_views

PROMPTS = ["red round", "small blue left"]
_BASE = {"scheduler": "DDIMScheduler", "unet": "UNet2DConditionModel", "vae": "AutoencoderTiny"}
_ABSENT = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor")


def make_recipe(root: Path) -> Recipe:
    """The trainings `tsc`, ELLA's, and `lavi`, LaVi-Bridge's with LoRA in both models; none has run."""
    make_world(root)
    index = {name: ["diffusers", kind] for name, kind in _BASE.items()} | {name: [None, None] for name in _ABSENT}
    whole = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.1", **index}
    (root / "models" / "base" / "model_index.json").write_text(json.dumps(whole))
    lora = LoRAConfig(targets=T5, rank=2, alpha=6.0, dropout=0.1)
    lavi = training_config(
        root,
        connector=LaViConfig(in_width=WIDTH, width=WIDTH, use_mask="mask"),
        language_model=language_model_config(root, lora=lora),
        denoiser=DenoiserConfig(model=str(root / "models" / "base"), lora=replace(lora, targets=UNET)),
        phases=(Phase(view="small", resolution=8, samples=36, batch=12, micro_batch=12, rate=1e-2),),
    )
    return Recipe(
        name="tiny",
        source=Source(path=str(root / "pairs.parquet"), url_column="url", text_column="text"),
        dataset=str(root / "dataset"),
        stages=(),
        runs=str(root / "runs"),
        trainings={"tsc": training_config(root), "lavi": lavi},
    )


def release(recipe: Recipe, training: str) -> Path:
    """Writes the release of a training with weights that are drawn; returns its folder."""
    config = recipe.trainings[training]
    language_model, denoiser = config.language_model.load(), config.denoiser.load(with_vae=False)
    bridge = Bridge(config.connector, language_model_lora=language_model.lora, denoiser_lora=denoiser.lora)
    torch.manual_seed(5)
    for parameter in bridge.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    parts = cast(
        Parts,
        SimpleNamespace(
            accelerator=SimpleNamespace(num_processes=1), language_model=language_model, denoiser=denoiser, beside=None
        ),
    )
    facts = facts_of(config, open_views(config, recipe.folder), parts)
    return write_release(recipe.run_folder(training), facts, State(samples=36), bridge.state_dict(), None)
