"""Each LoRA of a release is loaded by its own library, and does there what it does here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import PixArtTransformer2DModel, UNet2DConditionModel
from peft import PeftModel
from safetensors.torch import load_file

from tests.tiny_denoisers import make_pixart
from tests.tiny_releases import PROMPTS, make_recipe, release
from tests.training_fixtures import WIDTH
from training.bridge import Conditioning
from training.configuration import DenoiserConfig, LoRAConfig
from training.lora import PIXART
from training.lora_files import (
    DENOISER_FILE,
    diffusers_loads,
    is_on_hub,
    language_model_class,
    save_denoiser_lora,
    save_peft_lora,
)
from training.releases import load_bridge, read_release, release_parts


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

    model, lora = config.language_model.model, config.language_model.lora
    assert lora is not None
    save_peft_lora(parts["language_model_lora"], lora, tmp_path / "lora", model=model)
    assert str(tmp_path) not in (tmp_path / "lora" / "adapter_config.json").read_text()
    untouched = replace(config.language_model, lora=None).load()
    ids = language_model.tokenize(PROMPTS)
    before, _ = untouched.encode(ids)
    untouched.module = PeftModel.from_pretrained(untouched.module, str(tmp_path / "lora"))
    after, _ = untouched.encode(ids)
    expected, _ = language_model.encode(ids)
    assert torch.allclose(after, expected, atol=1e-6) and not torch.allclose(after, before, atol=1e-4)
    assert language_model_class(config.language_model) == type(language_model.module).__name__


def test_peft_loads_the_lora_of_a_network_that_diffusers_has_no_loader_for(tmp_path: Path) -> None:
    assert not diffusers_loads("PixArtTransformer2DModel") and diffusers_loads("SanaTransformer2DModel")
    lora = LoRAConfig(targets=PIXART, rank=2, alpha=6.0)
    config = DenoiserConfig(model=str(make_pixart(tmp_path / "pixart")), lora=lora)
    denoiser = config.load(with_vae=False)
    weights = {}
    for layer, module in denoiser.lora.items():
        for name, parameter in module.named_parameters():
            torch.nn.init.normal_(parameter, std=0.2)
            weights[f"{layer}.{name}"] = parameter.detach()
    save_peft_lora(weights, lora, tmp_path / "lora", model="PixArt-alpha/PixArt-XL-2-512x512", revision="abc")
    told = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (told["base_model_name_or_path"], told["revision"]) == ("PixArt-alpha/PixArt-XL-2-512x512", "abc")

    bare = replace(config, lora=None).load(with_vae=False)
    noisy, times = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3.0, 900.0])
    text = Conditioning(torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(1)), None)
    with torch.no_grad():
        expected, unchanged = denoiser.predict(noisy, times, text), bare.predict(noisy, times, text)
        network = PixArtTransformer2DModel.from_pretrained(config.model, subfolder="transformer")
        PeftModel.from_pretrained(network, str(tmp_path / "lora"))  # into the network itself, as the card says
        bare.network = network
        assert torch.allclose(bare.predict(noisy, times, text), expected, atol=1e-6)
    assert not torch.allclose(expected, unchanged, atol=1e-4)


def test_a_name_on_the_hub_is_no_path(tmp_path: Path) -> None:
    assert is_on_hub("google/flan-t5-xl") and is_on_hub("gpt2")
    assert not any(is_on_hub(path) for path in (str(tmp_path), "/elsewhere/t5", "./t5", "../a", "a/b/c"))
