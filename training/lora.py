"""Low-rank matrices inside frozen models (LoRA: Hu et al. 2021, arXiv 2106.09685), through peft, at layers named by their path.

Where LaVi-Bridge (Zhao et al. 2024, arXiv 2403.07860) puts them is here as patterns. It finds layers by the class of what they
lie in, which breaks without a word when a library renames a class; a pattern here that matches nothing is an error.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import TYPE_CHECKING

from .model_configuration import LoRAConfig

if TYPE_CHECKING:
    from torch import nn

ATTENTION = r".*attn\d\.(to_[qkv]|to_out\.0)"
"""All attention of diffusers' U-Nets and transformers. LaVi-Bridge's choice for PixArt (whose feed-forwards are no GEGLU): 16.5 M
parameters at rank 32."""
UNET = (r".*resnets\.\d+\.(conv\d|conv_shortcut|time_emb_proj)", ATTENTION, r".*ff\.net\.0\.proj")
"""LaVi-Bridge's choice for U-Nets: residual blocks, attention and GEGLU. SD 1.x: 224 layers, 28.3 M parameters at rank 32."""
PIXART = (ATTENTION,)
"""LaVi-Bridge's choice for PixArt."""
T5 = (r".*SelfAttention\.[qkvo]",)
"""LaVi-Bridge's choice for T5 encoders. T5-large: 6.3 M parameters at rank 32."""
LLAMA = (r".*self_attn\.[qkvo]_proj",)
"""LaVi-Bridge's choice for LLaMA, and the names of most decoders since. Llama-2-7b: 33.6 M parameters at rank 32."""

_ADAPTER = "default"  # peft's name for the only adapter there is


def add_lora(module: nn.Module, config: LoRAConfig, what: str) -> dict[str, nn.Module]:
    """Puts matrices into a frozen model, beside the linear and convolution layers that `config.targets` match: A at random, as
    LaVi-Bridge draws it, and B zero, so that the model is unchanged at first. They are float32 in a model of any dtype.

    Returns what was put in by its path: `<layer>.lora_A`, `<layer>.lora_B`, and with dropout `<layer>.lora_dropout`, which
    like the whole model is off (`eval`). Raises ValueError naming a pattern that matches no layer of the model, `what`.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        init_lora_weights="gaussian",
        target_modules="|".join(re.escape(path) for path in layers_at(module, config.targets, what)),
    )
    inject_adapter_in_model(settings, module, adapter_name=_ADAPTER)
    module.eval()  # what was put in is in training mode
    added: dict[str, nn.Module] = {}
    for path, layer in module.named_modules():
        if isinstance(layer, LoraLayer):
            names = ("lora_A", "lora_B", "lora_dropout") if config.dropout else ("lora_A", "lora_B")
            added |= {f"{path}.{name}": getattr(layer, name)[_ADAPTER].float() for name in names}
    return added


def layers_at(module: nn.Module, targets: tuple[str, ...], what: str) -> list[str]:
    """The paths of the linear and convolution layers that one of the regular expressions matches whole, in the model's order.

    Raises ValueError in one line for an expression that matches none.
    """
    from torch import nn

    paths = [path for path, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    found: set[str] = set()
    for target in targets:
        matched = {path for path in paths if re.fullmatch(target, path)}
        if not matched:
            raise ValueError(
                f"lora.targets: {target!r} matches no linear or convolution layer of {what}; {_near(target, paths)}"
            )
        found |= matched
    return [path for path in paths if path in found]


def _near(target: str, paths: list[str]) -> str:
    """The paths whose ends look most like an expression's; of those that end alike, as in every block, the first."""
    ends = {".".join(path.split(".")[-2:]): path for path in reversed(paths)}
    near = get_close_matches(re.sub(r"[^\w.]", "", target), ends, n=3, cutoff=0)
    return f"near are {', '.join(ends[end] for end in near)}" if near else "it has none"
