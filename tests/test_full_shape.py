"""Every recipe at its full shape: models as published, but weights that take no memory (torch's meta device); the counts of what
is trained; and the trainer's own step, forwards and backwards, and its FLOPs.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.published_configs import DENOISER_PARAMETERS, DENOISERS, LANGUAGE_MODEL_PARAMETERS, LANGUAGE_MODELS
from jobs.recipe import RECIPES, Recipe, load_recipe
from pipeline.captions import TokenizerConfig
from training.batches import Batch
from training.configuration import SpeedConfig, TrainingConfig
from training.encoding import encode
from training.flops import sample_flops
from training.parts import Parts, load_parts
from training.step import losses_of

POOL = 3 * (2048 * 2048 + 2048) + 2048 * 1280 + 1280  # queries, keys and values, and the projection to 1280
T5_LORA = 24 * 4 * 32 * 2 * 1024  # layers x (q, k, v, o) x rank x (in + out)
LLAMA_LORA = 32 * 4 * 32 * 2 * 4096
UNET_LORA = 28_291_072  # residual blocks 18.3 million, attention 6.4, GEGLU 3.6
PIXART_LORA = 28 * 8 * 32 * 2 * 1152

TRAINED = {
    ("ella_sd15", "tsc"): {"connector": 66_820_608},
    ("ella_sdxl", "tsc"): {"connector": 466_546_688, "pool": POOL},
    ("ella_tinyllama", "tsc"): {"connector": 66_820_608},
    ("ella_tinyllama", "adaln_zero"): {"connector": 73_907_712},
    ("ella_tinyllama", "resampler_6"): {"connector": 44_159_232},
    ("ella_tinyllama", "resampler_1"): {"connector": 8_712_192},
    ("ella_tinyllama", "mlp"): {"connector": 2_164_224},
    ("ella_tinyllama", "tsc_mean"): {"connector": 66_820_608},
    ("ella_llama2", "resampler_6"): {"connector": 46_518_528},
    ("ella_llama2", "tsc"): {"connector": 69_179_904},
    ("ella_llama2", "tsc_mean"): {"connector": 69_179_904},
    ("lavi_t5_sd14", "lavi"): {
        "connector": 21_254_528,
        "language_model_lora": T5_LORA,
        "denoiser_lora": UNET_LORA,
    },
    ("lavi_llama2_sd14", "lavi"): {
        "connector": 228_920_192,
        "language_model_lora": LLAMA_LORA,
        "denoiser_lora": UNET_LORA,
    },
    ("lavi_t5_pixart", "lavi"): {
        "connector": 113_288_704,
        "language_model_lora": T5_LORA,
        "denoiser_lora": PIXART_LORA,
    },
    ("queries_sana", "sana_600m"): {"connector": 307_398_912},
    ("queries_sana", "sana_1600m"): {"connector": 307_398_912},
}
"""By recipe and training, what is trained: from the papers where they tell it, else from the shapes."""


def taken_to_hold(tensor: torch.Tensor) -> bool:
    """Whether a tensor without values holds: it is taken to. All is finite, no mask hides a token."""
    return tensor.is_meta or bool(tensor.item())


class Tokenizer:
    """What a language model asks of its tokenizer, without the vocabulary."""

    pad = 0

    def __init__(self, config: TokenizerConfig) -> None:
        assert not isinstance(config.max_length, str)
        self.limit = config.max_length

    def tokenize(self, texts: list[str]) -> list[np.ndarray]:
        return [np.ones(1 + len(text.split()), np.int32) for text in texts]


@pytest.fixture(scope="module", autouse=True)
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The models' own configuration files instead of a hub, and weights on the meta device."""
    from diffusers import ModelMixin
    from transformers import AutoConfig, PreTrainedModel

    hub = tmp_path_factory.mktemp("hub")
    for name, facts in LANGUAGE_MODELS.items():
        write(hub / name / "config.json", facts)
    for name, folders in DENOISERS.items():
        for folder, facts in folders.items():
            write(hub / name / folder / f"{'scheduler_' * (folder == 'scheduler')}config.json", facts)

    def load(cls: Any, model: str, *_: Any, config: Any = None, subfolder: str = "", **told: Any) -> Any:
        config = config or AutoConfig.from_pretrained(model, subfolder=subfolder)
        with torch.device("meta"):
            module = cls._from_config(config, dtype=told.get("dtype") or told.get("torch_dtype"))
        return (module, {"missing_keys": []}) if told.get("output_loading_info") else module

    def load_network(cls: Any, model: str, subfolder: str = "", torch_dtype: Any = None, **_: Any) -> Any:
        with torch.device("meta"):
            return cls.from_config(cls.load_config(model, subfolder=subfolder)).to(torch_dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(hub)  # a name on the hub is now a folder
        patch.setattr(PreTrainedModel, "from_pretrained", classmethod(load))
        patch.setattr(ModelMixin, "from_pretrained", classmethod(load_network))
        patch.setattr("training.language_models.load_tokenizer", Tokenizer)
        patch.setattr(torch.Tensor, "__bool__", taken_to_hold)
        yield


def write(path: Path, facts: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts))


@cache
def recipe_of(name: str) -> Recipe:
    return load_recipe(name)


def parts_of(config: TrainingConfig) -> Parts:
    """What the trainer puts together at the start of a run."""
    alone = SimpleNamespace(
        device=torch.device("meta"),
        num_processes=1,
        prepare_model=lambda model, evaluation_mode: model,
        prepare_optimizer=lambda optimizer: optimizer,
        unwrap_model=lambda model: model,
    )
    with torch.device("meta"):
        return load_parts(config, alone)


def batch_of(parts: Parts, resolution: int) -> Batch:
    """Two samples, one with the longest prompt and one with the empty one."""
    channels, height, width = shape = parts.denoiser.latent_shape(resolution)
    drawn = parts.denoiser.vae_facts.is_drawn
    return Batch(
        positions=[0, 1],
        keys=["long", "empty"],
        pixels=None,
        latents=torch.empty(2, channels * (1 + drawn), height, width, device="meta"),
        ids=[np.ones(parts.language_model.tokenizer.limit, np.int32), np.array(parts.empty_ids, np.int32)],
        beside_ids=[],
        sizes=torch.empty(2, 6, device="meta"),
        timesteps=torch.empty(2, dtype=torch.int64, device="meta"),
        noise=torch.empty(2, *shape, device="meta"),
        posterior_noise=torch.empty(2, *shape, device="meta") if drawn else None,
        weights=torch.ones(2, device="meta"),
        bad=[],
    )


def test_no_training_is_left_out() -> None:
    names = sorted(path.stem for path in RECIPES.glob("*.py") if path.stem != "__init__")
    assert {(name, training) for name in names for training in recipe_of(name).trainings} == set(TRAINED)


@pytest.mark.parametrize(("name", "training"), TRAINED)
def test_a_step_of_every_training(name: str, training: str) -> None:
    recipe = recipe_of(name)
    config = replace(recipe.trainings[training], speed=SpeedConfig())  # no code is compiled for no device
    parts = parts_of(config)
    counts = {part: sum(p.numel() for p in module.parameters()) for part, module in parts.bridge.named_children()}
    assert counts == TRAINED[name, training]
    models = (parts.language_model.module, parts.denoiser.network)
    known = LANGUAGE_MODEL_PARAMETERS[config.language_model.model], DENOISER_PARAMETERS[config.denoiser.model]
    for model, lora, expected in zip(models, ("language_model_lora", "denoiser_lora"), known, strict=True):
        assert sum(p.numel() for p in model.parameters()) == expected + counts.get(lora, 0)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == counts.get(lora, 0)
    base = recipe.evaluation.base if recipe.evaluation else None
    assert base is None or base.load().width == parts.denoiser.width
    found = encode(parts, batch_of(parts, config.phases[-1].resolution), "0/0")
    losses, weights = losses_of(parts, found, "0/0"), found.weights
    (losses * weights).sum().backward()
    assert losses.shape == (2,) and losses.dtype == torch.float32
    trained = {id(parameter) for parameter in parts.bridge.parameters()}
    assert all(parameter.grad is not None for parameter in parts.bridge.parameters())
    assert all((p.grad is not None) is (id(p) in trained) for model in models for p in model.parameters())


@pytest.mark.parametrize(
    ("recipe", "resolution", "encoding", "training"),
    [
        ("ella_sd15", 512, 1.12 + 0.30, 1.67 + 0.024),  # VAE + T5-XL at 128 tokens; U-Net + 3 x the TSC
        ("ella_sdxl", 1024, 4.88 + 0.30, 14.24 + 0.161),  # the U-Net with its pooled text from the connector
    ],
)
def test_the_flops_of_a_sample(recipe: str, resolution: int, encoding: float, training: float) -> None:
    """Within 1 % of counts that were made of the bare diffusers and transformers models, each by itself."""
    parts = parts_of(next(iter(recipe_of(recipe).trainings.values())))
    pixels = torch.empty(2, 3, resolution, resolution, device="meta")
    found = sample_flops(parts, dataclasses.replace(batch_of(parts, resolution), latents=None, pixels=pixels))
    assert found.encoding / 1e12 == pytest.approx(encoding, rel=0.01)
    assert found.training / 1e12 == pytest.approx(training, rel=0.01)
    assert found.total == found.encoding + found.training
    stored = sample_flops(parts, batch_of(parts, resolution))
    assert stored.training == found.training and stored.encoding / 1e12 == pytest.approx(0.30, rel=0.01)


def test_the_papers_totals() -> None:
    millions = {name: sum(TRAINED[name, "lavi"].values()) / 1e6 for name in {n for n, t in TRAINED if t == "lavi"}}
    assert {name: round(total, 1) for name, total in millions.items()} == {
        "lavi_t5_sd14": 55.8, "lavi_llama2_sd14": 290.8, "lavi_t5_pixart": 136.1,
    }  # fmt: skip
