"""Frozen language models, the same way in build and training: token ids to the hidden states that a connector reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np


def load_text_model(model: str, revision: str | None, subfolder: str, dtype: str) -> Any:
    """A text encoder or decoder of the hub or a folder, frozen, on the CPU. Raises OSError or ValueError that says what is
    missing.
    """
    import torch

    module = _text_model(model, revision, subfolder)
    # The whole module at once: `from_pretrained(dtype=float16)` would keep T5's `wo` in float32: other features.
    return module.to(getattr(torch, dtype)).eval().requires_grad_(False)


def _text_model(model: str, revision: str | None, subfolder: str) -> Any:
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, CLIPTextModel
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES

    config = AutoConfig.from_pretrained(model, revision=revision, subfolder=subfolder)
    settings: dict[str, Any] = {
        "revision": revision,
        "subfolder": subfolder,
        "dtype": torch.float32,
        "use_safetensors": True,
    }
    if config.model_type == "clip":
        return CLIPTextModel.from_pretrained(model, **settings)
    if config.model_type in MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES:
        # Not AutoModel: for a T5 encoder it would add a decoder with random weights.
        return AutoModelForTextEncoding.from_pretrained(model, **settings)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{model} is a {config.model_type} with a decoder: save its encoder alone and name that folder"
        )
    return AutoModel.from_pretrained(model, **settings)


def width_of(module: Any) -> int:
    """Width of the hidden states."""
    return int((getattr(module.config, "text_config", None) or module.config).hidden_size)


def hidden_states(
    module: Any, ids: Sequence[np.ndarray], *, length: int, pad: int, pads: Literal["hidden", "seen"]
) -> tuple[Any, Any]:
    """Token ids (n,) each, n at most `length` -> last hidden state (B, length, width) in the model's dtype, mask (B, length).

    `pads` "hidden": the mask (bool) hides what was padded, from the model and from who reads on; "seen": it hides nothing.
    """
    import torch

    padded = np.full((len(ids), length), pad, dtype=np.int64)
    filled = np.zeros((len(ids), length), dtype=bool)
    for row, one in enumerate(ids):
        padded[row, : len(one)] = one
        filled[row, : len(one)] = True
    device = next(module.parameters()).device
    mask = torch.from_numpy(filled if pads == "hidden" else np.ones_like(filled)).to(device)
    with torch.no_grad():
        found = module(input_ids=torch.from_numpy(padded).to(device), attention_mask=mask.long())
    return found.last_hidden_state, mask
