"""A release's LoRA as files that other programs load by themselves: diffusers' for the denoiser, where it has a loader for such
a network, and peft's for all else.

Their product is multiplied by alpha / rank. That factor goes into the second matrices here, so a reader that is not told of it,
and takes it for one, is right.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from .bridge import Weights
from .model_configuration import LanguageModelConfig, LoRAConfig
from .whole_files import save_weights

DENOISER_FILE = "pytorch_lora_weights.safetensors"
"""Where `load_lora_weights` of a diffusers pipeline looks in a folder."""


def diffusers_loads(network: str) -> bool:
    """Whether diffusers loads a LoRA into this class of network (a U-Net, SANA's transformer) by itself; into others, such as
    PixArt's, peft does.
    """
    import diffusers

    return hasattr(getattr(diffusers, network), "load_lora_adapter")


def save_denoiser_lora(weights: Weights, config: LoRAConfig, subfolder: str, folder: Path) -> Path:
    """Writes the matrices (`<layer>.lora_A.weight`, `<layer>.lora_B.weight`) for `load_lora_weights`; `subfolder` is where the
    network lies in a pipeline, "unet" or "transformer".
    """
    path = folder / DENOISER_FILE
    save_weights({f"{subfolder}.{name}": tensor for name, tensor in _scaled(weights, config).items()}, path)
    return path


def save_peft_lora(
    weights: Weights, config: LoRAConfig, folder: Path, *, model: str, revision: str | None = None
) -> Path:
    """Writes the folder that peft's `PeftModel.from_pretrained(module, folder)` loads; `model` is named in it where it is a name
    on the hub, for a folder's path would say something on this machine alone.
    """
    on_hub = is_on_hub(model)
    layers = sorted({name.rsplit(".lora_", 1)[0] for name in weights})
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": model if on_hub else None,
        "revision": revision if on_hub else None,
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


def language_model_class(config: LanguageModelConfig) -> str:
    """The class of transformers whose layers a LoRA of this language model names: the encoder, or the decoder without a head."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES, MODEL_MAPPING_NAMES

    place = {"revision": config.revision, "subfolder": config.subfolder}
    kind = AutoConfig.from_pretrained(config.model, **place, trust_remote_code=False).model_type
    if kind == "clip":
        return "CLIPTextModel"
    return str(MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES.get(kind) or MODEL_MAPPING_NAMES[kind])


def is_on_hub(model: str) -> bool:
    """Whether this is a name on the hub, and no folder here or elsewhere."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", model) is not None and not Path(model).is_dir()


def _scaled(weights: Weights, config: LoRAConfig) -> Weights:
    factor = config.alpha / config.rank
    return {name: tensor * factor if ".lora_B." in name else tensor for name, tensor in sorted(weights.items())}
