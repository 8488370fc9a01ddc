"""Each LoRA of a release is loaded by its own library, and does there what it does here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from peft import PeftModel
from safetensors.torch import load_file

from tests.tiny_releases import PROMPTS, make_recipe, release
from tests.training_fixtures import WIDTH
from training.bridge import Conditioning
from training.checkpoints import load_bridge, read_release, release_parts
from training.lora_files import DENOISER_FILE, save_denoiser_lora, save_language_model_lora


def test_each_lora_is_loaded_by_its_own_library(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    config, folder = recipe.trainings["lavi"], release(recipe, "lavi")
    language_model, denoiser = config.language_model.load(), config.denoiser.load(with_vae=False)
    load_bridge(folder, language_model=language_model, denoiser=denoiser)
    parts = release_parts(folder, read_release(folder))
    assert config.denoiser.lora is not None

    save_denoiser_lora(parts["denoiser_lora"], config.denoiser.lora, "unet", tmp_path)
    network = UNet2DConditionModel.from_pretrained(config.denoiser.model, subfolder="unet")
    network.load_lora_adapter(load_file(tmp_path / DENOISER_FILE), prefix="unet")
    bare = replace(config.denoiser, lora=None).load(with_vae=False)
    noisy, times = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3.0, 900.0])
    text = Conditioning(torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(1)), None)
    with torch.no_grad():
        expected, unchanged = denoiser.predict(noisy, times, text), bare.predict(noisy, times, text)
        assert torch.allclose(network(noisy, times, text.tokens).sample, expected, atol=1e-6)
    assert not torch.allclose(expected, unchanged, atol=1e-4)

    save_language_model_lora(parts["language_model_lora"], config.language_model, tmp_path / "lora")
    untouched = replace(config.language_model, lora=None).load()
    ids = language_model.tokenize(PROMPTS)
    before, _ = untouched.encode(ids)
    untouched.module = PeftModel.from_pretrained(untouched.module, str(tmp_path / "lora"))
    after, _ = untouched.encode(ids)
    expected, _ = language_model.encode(ids)
    assert torch.allclose(after, expected, atol=1e-6) and not torch.allclose(after, before, atol=1e-4)
