"""The folder that diffusers loads draws what `generate` draws, by either door, and its siblings share the network."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.fingerprint import plain
from tests.tiny_denoisers import make_unet
from tests.tokenizer_families import clip
from tests.training_fixtures import language_model_config, make_language_model, tsc_config
from training.bridge import Bridge
from training.checkpoints import State
from training.configuration import LoRAConfig
from training.denoisers import DenoiserConfig
from training.diffusers_folder import load_pipeline, save_pipeline
from training.generation import generate, start_noise
from training.lora import ATTENTION
from training.releases import write_release

PROMPTS = ["red round", "blue square big left"]


def denoiser_config(root: Path) -> DenoiserConfig:
    lora = LoRAConfig(targets=(ATTENTION,), rank=2) if (root / "lora").exists() else None
    return DenoiserConfig(model=str(root / "base"), lora=lora)


@pytest.fixture(scope="module", params=["plain", "lora"])
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with all that a pipeline has, and a release for it; with a LoRA in the denoiser, or without."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    root = tmp_path_factory.mktemp("folder")
    make_language_model(root / "models" / "t5")
    make_unet(root / "parts")
    denoiser = DenoiserConfig(model=str(root / "parts")).load()
    text = CLIPTextModel(
        CLIPTextConfig(vocab_size=600, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    StableDiffusionPipeline(
        vae=denoiser.vae, text_encoder=text, tokenizer=clip(), unet=denoiser.network, safety_checker=None,
        scheduler=DDIMScheduler.from_config(denoiser.scheduler), feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(root / "base")  # fmt: skip
    if request.param == "lora":
        (root / "lora").touch()
    torch.manual_seed(0)
    language_model, base = language_model_config(root).load(), denoiser_config(root).load()
    bridge = Bridge(tsc_config(), denoiser_lora=base.lora)
    for name, parameter in bridge.named_parameters():
        parameter.data *= 9  # random weights hardly listen to the text
        if "lora" in name:
            parameter.data = torch.randn_like(parameter) * 0.3
    facts = {
        "connector": plain(tsc_config()),
        "language_model": language_model.identity(),
        "denoiser": base.identity(),
        "beside": None,
        "training": {},
        "phases": [],
    }
    write_release(root / "run", facts, State(samples=1), bridge.state_dict(), None)
    np.save(
        root / "images.npy",
        generate(
            language_model=language_model, bridge=bridge.eval(), denoiser=base, prompts=PROMPTS, resolution=8, steps=2,
            guidance=3.0, seeds=[1, 2], batch=2,
        ),
    )  # fmt: skip
    return root


@pytest.fixture(scope="module")
def folder(root: Path) -> Path:
    return save_pipeline(
        root / "saved",
        release=root / "run" / "release",
        language_model=language_model_config(root),
        denoiser=denoiser_config(root),
    )


def test_models_named_from_here_are_found_from_anywhere(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    text = replace(language_model_config(root), model="models/t5", tokenizer_model="models/t5")
    base = replace(denoiser_config(root), model="org/base")
    save_pipeline(tmp_path / "saved", release=root / "run" / "release", language_model=text, denoiser=base)
    found = json.loads((tmp_path / "saved" / "release" / "models.json").read_text())
    assert {found["language_model"][name] for name in ("model", "tokenizer_model")} == {str(root / "models" / "t5")}
    assert found["denoiser"]["model"] == "org/base"


def drawn(pipeline: Any, *prompts: Any, **told: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.from_numpy(np.stack([start_noise(seed, (4, 4, 4)) for seed in (1, 2)])).to(pipeline.unet.dtype)
    found = pipeline(
        *prompts, **told, latents=noise, num_inference_steps=2, guidance_scale=3.0, height=8, width=8, output_type="np"
    )
    return (found.images * 255).round().astype(np.uint8)


def test_the_round_trip(root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.setattr("diffusers.utils.constants.HF_MODULES_CACHE", str(tmp_path))
    expected = np.load(root / "images.npy")
    pipeline = DiffusionPipeline.from_pretrained(
        str(folder), custom_pipeline=str(folder / "pipeline.py"), trust_remote_code=True
    )
    assert type(pipeline).__name__ == "StableDiffusionPipeline" and pipeline.text_encoder is None
    assert np.abs(drawn(pipeline, PROMPTS).astype(int) - expected).max() <= 1
    alone = DiffusionPipeline.from_pretrained(str(folder), trust_remote_code=True)  # model_index.json names the file
    assert type(alone).__name__ == "StableDiffusionPipeline" and alone.attached
    told = pipeline.attached.encode(PROMPTS)
    assert np.abs(drawn(pipeline, **told).astype(int) - expected).max() <= 1
    moved = folder.rename(root / "moved")
    other = load_pipeline(moved)
    moved.rename(folder)
    assert np.abs(drawn(other, PROMPTS).astype(int) - expected).max() <= 1
    assert np.abs(drawn(other, PROMPTS, negative_prompt="small").astype(int) - expected).max() > 1
    assert not [p for p in folder.rglob("*") if p.suffix in (".bin", ".pt", ".pkl")]


def test_another_dtype(root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.setattr("diffusers.utils.constants.HF_MODULES_CACHE", str(tmp_path))
    expected = np.load(root / "images.npy")
    for pipeline in (
        DiffusionPipeline.from_pretrained(str(folder), trust_remote_code=True, torch_dtype=torch.bfloat16),
        load_pipeline(folder, torch.bfloat16),
    ):
        assert (pipeline.unet.dtype, pipeline.vae.dtype) == (torch.bfloat16, torch.bfloat16)
        assert pipeline.attached.language_model.module.dtype == torch.float32
        difference = np.abs(drawn(pipeline, PROMPTS).astype(int) - expected)
        assert 0 < difference.mean() < 10
    with pytest.raises(ValueError, match=r"denoiser\.dtype is 'float64': choose float32"):
        load_pipeline(folder, torch.float64)


def test_siblings_share_the_network(root: Path, folder: Path) -> None:
    from diffusers import StableDiffusionImg2ImgPipeline

    pipeline = load_pipeline(folder)
    sibling = StableDiffusionImg2ImgPipeline.from_pipe(pipeline)
    sibling.set_progress_bar_config(disable=True)
    image, pictures = torch.rand(2, 3, 8, 8), []
    for prompts in (PROMPTS, PROMPTS[::-1]):
        made = sibling(
            **pipeline.attached.encode(prompts), image=image, strength=1.0, num_inference_steps=2, output_type="np",
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        pictures.append(made.images)
    assert sibling.unet is pipeline.unet and np.abs(pictures[0] - pictures[1]).max() > 0.01


def test_what_cannot_be_saved_or_loaded(root: Path, folder: Path, tmp_path: Path) -> None:
    settings = {"language_model": language_model_config(root), "denoiser": denoiser_config(root)}
    with pytest.raises(FileExistsError, match="saved is not empty: name a new folder"):
        save_pipeline(folder, release=root / "run" / "release", **settings)
    with pytest.raises(FileNotFoundError, match="holds no connector"):
        save_pipeline(tmp_path / "new", release=root / "run", **settings)
    assert not (tmp_path / "new").exists()
    with pytest.raises(FileNotFoundError, match="holds no release of densebridge"):
        load_pipeline(tmp_path)
    models = json.loads((folder / "release" / "models.json").read_text())
    assert models["denoiser"]["model"] == str(root / "base") and models["beside"] is None
