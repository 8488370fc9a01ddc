"""A release's LoRA as files that other programs load by themselves: diffusers' for the denoiser, peft's for the language model.

Their product is multiplied by alpha / rank. That factor goes into the second matrices here, so a reader that is not told of it,
and takes it for one, is right.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from .bridge import Weights
from .checkpoints import save_weights
from .model_configuration import LanguageModelConfig, LoRAConfig

DENOISER_FILE = "pytorch_lora_weights.safetensors"
"""Where `load_lora_weights` of a diffusers pipeline looks in a folder."""


def save_denoiser_lora(weights: Weights, config: LoRAConfig, subfolder: str, folder: Path) -> Path:
    """Writes the matrices (`<layer>.lora_A.weight`, `<layer>.lora_B.weight`) for `load_lora_weights`; `subfolder` is where the
    network lies in a pipeline, "unet" or "transformer".
    """
    path = folder / DENOISER_FILE
    save_weights({f"{subfolder}.{name}": tensor for name, tensor in _scaled(weights, config).items()}, path)
    return path


def save_language_model_lora(weights: Weights, language_model: LanguageModelConfig, folder: Path) -> Path:
    """Writes the folder that peft's `PeftModel.from_pretrained(language_model, folder)` loads."""
    config = language_model.lora
    assert config is not None
    layers = sorted({name.rsplit(".lora_", 1)[0] for name in weights})
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": language_model.model,
        "revision": language_model.revision,
        "r": config.rank,
        "lora_alpha": config.rank,
        "target_modules": "|".join(re.escape(layer) for layer in layers),
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    scaled = {f"base_model.model.{name}": tensor for name, tensor in _scaled(weights, config).items()}
    save_weights(scaled, folder / "adapter_model.safetensors")
    return folder


def _scaled(weights: Weights, config: LoRAConfig) -> Weights:
    factor = config.alpha / config.rank
    return {name: tensor * factor if ".lora_B." in name else tensor for name, tensor in sorted(weights.items())}
