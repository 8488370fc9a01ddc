"""Frozen language models, the same way in build and training: token ids to the hidden states that a connector reads."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal

import numpy as np

from .devices import sent

Layers = Literal["last", "mean", "all"] | int
"""Which hidden states are read. A number n: those after n layers, 0 being the embeddings and -1 the last; the last are always
those after the model's final norm. "all": those after each layer, so not the embeddings, as they are. "mean": the same ones
through a layer norm without learned scale, then averaged (Wang et al. 2025, arXiv 2506.08210)."""


def load_text_model(model: str, revision: str | None, subfolder: str, dtype: str, quantization: Any = None) -> Any:
    """A text encoder or decoder of the hub or a folder, frozen, on the CPU; with `quantization_of` some bits, on the process's
    GPU. Safetensors only, no remote code. Raises OSError or ValueError that says what is missing.
    """
    import torch

    settings = {"dtype": getattr(torch, dtype), "use_safetensors": True}
    if quantization is not None:
        settings |= {"quantization_config": quantization, "device_map": {"": torch.cuda.current_device()}}
    module = _text_model(model, {"revision": revision, "subfolder": subfolder}, settings)
    if quantization is None:
        # All weights: `from_pretrained` keeps T5's `wo` in float32, which gives other features. But no buffers: they hold the
        # frequencies of rotary positions, and a token's place is wrong where these are rounded.
        for weight in module.parameters():
            weight.data = weight.data.to(settings["dtype"])
    config = config_of(module)
    if hasattr(config, "use_cache"):
        config.use_cache = False  # nothing is generated, so keys and values need not be kept
    return module.eval().requires_grad_(False)


def _text_model(model: str, place: dict[str, Any], settings: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, CLIPTextModel
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES

    config = AutoConfig.from_pretrained(model, **place, trust_remote_code=False)
    settings = settings | place | {"trust_remote_code": False, "output_loading_info": True}
    if config.model_type == "clip":
        module, found = CLIPTextModel.from_pretrained(model, **settings)
    elif config.model_type in MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES:
        # Not AutoModel: for a T5 encoder it would add a decoder with random weights.
        config.is_encoder_decoder = False
        module, found = AutoModelForTextEncoding.from_pretrained(model, config=config, **settings)
    elif config.is_encoder_decoder:
        raise ValueError(
            f"{model} is a {config.model_type} with a decoder: save its encoder alone and name that folder"
        )
    else:
        module, found = AutoModel.from_pretrained(model, **settings)
    missing = sorted(name for name in found["missing_keys"] if "pooler" not in name)  # which no hidden state depends on
    if missing:
        raise ValueError(
            f"{model} holds no weights for {len(missing)} parameters of {type(module).__name__}, the first is {missing[0]}: "
            "name a folder or revision that has them"
        )
    return module


def config_of(module: Any) -> Any:
    """Of a model's configuration the part that tells of the text's layers."""
    config = module.config
    return getattr(config, "text_config", None) or getattr(config, "encoder", None) or config


def width_of(module: Any) -> int:
    """Width of the hidden states."""
    return int(config_of(module).hidden_size)


def depth_of(module: Any) -> int:
    """Number of layers."""
    return int(config_of(module).num_hidden_layers)


def positions_of(module: Any) -> int | None:
    """Most tokens that it was made for, where it says so; T5 does not. RoBERTa counts its places from behind the pad's."""
    positions = getattr(config_of(module), "max_position_embeddings", None)
    table = getattr(getattr(module, "embeddings", None), "position_embeddings", None)
    before = getattr(table, "padding_idx", None)
    return positions if positions is None or before is None else positions - before - 1


def hidden_states(
    module: Any,
    ids: Sequence[np.ndarray],
    *,
    length: int,
    pad: int,
    pads: Literal["hidden", "seen"],
    layers: Layers = "last",
    gradient: bool = False,
) -> tuple[Any, Any]:
    """Token ids (n,) each, n at most `length` -> hidden states (B, length, width), or (B, depth, length, width) of "all"
    layers, in the model's dtype, mask (B, length).

    `pads` "hidden": the mask (bool) hides what was padded, from the model and from who reads on; "seen": it hides nothing.
    `gradient`: whether parameters inside the model are trained.
    """
    import torch

    padded, filled = _padded(ids, length, pad, next(module.parameters()).device)
    mask = filled if pads == "hidden" else torch.ones_like(filled)
    with nullcontext() if gradient else torch.no_grad():
        return _read(module, layers, mask, input_ids=padded), mask


def hidden_states_behind(
    module: Any, ids: Sequence[np.ndarray], appended: Any, *, pad: int, layers: Layers = "last"
) -> Any:
    """What a model makes of learned embeddings `appended` (N, width) right behind the last token of each prompt -> hidden
    states at their places (B, N, width), or (B, depth, N, width) of "all" layers. Gradients flow to `appended`.

    They take the places of a row's first pads, so that positions and causal masks are those of the prompt alone. Their scale
    is that of the model's table of embeddings: what multiplies a token's row (Gemma: the root of the width) multiplies theirs.
    """
    import torch

    table, number = module.get_input_embeddings(), len(appended)
    lengths = [len(one) for one in ids]
    padded, _ = _padded(ids, max(lengths) + number, pad, next(module.parameters()).device)
    embedded = table(padded)
    ends = torch.tensor(lengths, device=padded.device)[:, None]
    places = (ends + torch.arange(number, device=padded.device))[..., None].expand(-1, -1, embedded.shape[-1])
    rows = appended.to(embedded.dtype) * getattr(table, "embed_scale", 1.0)
    embedded = embedded.scatter(1, places, rows.to(embedded.dtype).expand(len(ids), -1, -1))
    mask = torch.arange(padded.shape[1], device=padded.device) < ends + number
    hidden = _read(module, layers, mask, inputs_embeds=embedded)
    return hidden.gather(-2, places if hidden.ndim == 3 else places[:, None].expand(-1, hidden.shape[1], -1, -1))


def _padded(ids: Sequence[np.ndarray], length: int, pad: int, device: Any) -> tuple[Any, Any]:
    """Ids (B, length), with pads on the right, and which of them are none, bool."""
    import torch

    padded = np.full((len(ids), length), pad, dtype=np.int64)
    filled = np.zeros((len(ids), length), dtype=bool)
    for row, one in enumerate(ids):
        padded[row, : len(one)] = one
        filled[row, : len(one)] = True
    return sent(torch.from_numpy(padded), device), sent(torch.from_numpy(filled), device)


def _read(module: Any, layers: Layers, mask: Any, **given: Any) -> Any:
    """Runs the model; its hidden states of the layers asked for."""
    import torch
    from torch.nn import functional as F

    if layers == "last":
        return module(**given, attention_mask=mask.long()).last_hidden_state
    found = module(**given, attention_mask=mask.long(), output_hidden_states=True)
    states = (*found.hidden_states[:-1], found.last_hidden_state)  # CLIP's own last are those before the norm
    if isinstance(layers, int):
        return states[layers]
    if layers == "all":
        return torch.stack(states[1:], dim=1)
    total = torch.zeros_like(states[1], dtype=torch.float32)
    for state in states[1:]:
        total = total + F.layer_norm(state.float(), state.shape[-1:])
    return (total / (len(states) - 1)).to(states[1].dtype)
