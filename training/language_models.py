"""The frozen language model: token ids to the hidden states that a connector reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.captions import tokenize, tokenizer_id
from pipeline.fingerprint import model_id
from pipeline.shards import ViewInfo

from .configuration import LanguageModelConfig


def load_language_model(config: LanguageModelConfig) -> LanguageModel:
    """Tokenizer and frozen model, on the CPU. Raises OSError or ValueError that says what is missing."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        config.tokenizer_model or config.model, revision=config.revision, subfolder=config.tokenizer_subfolder
    )
    module = _text_model(config.model, config.revision, config.subfolder)
    # The whole module at once: `from_pretrained(dtype=float16)` would keep T5's `wo` in float32: other features.
    module = module.to(getattr(torch, config.dtype)).eval().requires_grad_(False)
    return LanguageModel(config, tokenizer, module)


def _text_model(model: str, revision: str | None, subfolder: str) -> nn.Module:
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


def check_view(config: LanguageModelConfig, info: ViewInfo) -> None:
    """Raises ValueError when the view's tokens were not made by this language model's tokenizer at this length."""
    found = info.tokenizers.get(config.tokenizer)
    where = f"view {info.view!r}"
    if found is None:
        names = ", ".join(sorted(info.tokenizers)) or "none"
        raise ValueError(f"{where} has no tokens {config.tokenizer!r} (it has: {names}): set language_model.tokenizer")
    expected = tokenizer_id(config.tokenizer_model or config.model, config.revision)
    if found["id"] != expected:
        raise ValueError(
            f"{where}: tokens {config.tokenizer!r} were made by {found['id']}, the language model's tokenizer is "
            f"{expected}: pretokenize with {config.tokenizer_model or config.model} and pack again"
        )
    if found["max_length"] != config.max_length:
        raise ValueError(
            f"{where}: tokens {config.tokenizer!r} were cut at {found['max_length']}, language_model.max_length is "
            f"{config.max_length}: make them equal"
        )


class LanguageModel:
    """A frozen language model with its tokenizer."""

    def __init__(self, config: LanguageModelConfig, tokenizer: Any, module: nn.Module) -> None:
        self.config, self.tokenizer, self.module = config, tokenizer, module
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if pad is None:
            raise ValueError(f"the tokenizer of {config.model} has neither a pad nor an end token: give it one")
        self.pad = int(pad)
        shape: Any = module.config
        self.width = int((getattr(shape, "text_config", None) or shape).hidden_size)
        """Width of the hidden states."""

    def to(self, device: torch.device | str) -> LanguageModel:
        """Moves the weights; returns itself."""
        self.module.to(device)
        return self

    def tokenize(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids with the end token, cut at `max_length`, not padded: int32 (length,) each."""
        return tokenize(self.tokenizer, texts, self.config.max_length)

    def encode(
        self, ids: Sequence[np.ndarray], names: Sequence[str] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids (length,) each -> last hidden state (B, L, width) in the model's dtype, mask (B, L) bool.

        Raises ValueError naming the first sample (`names`, else its number) that is too long or that overflows.
        """
        hidden, mask, finite = self.encode_where_finite(ids, names)
        if not bool(finite.all()):
            bad = int((~finite).nonzero()[0, 0])
            raise ValueError(
                f"sample {names[bad] if names else bad}: {self.config.model} in {self.config.dtype} gives values that "
                "are not finite: use bfloat16 or float32"
            )
        return hidden, mask

    @torch.no_grad()
    def encode_where_finite(
        self, ids: Sequence[np.ndarray], names: Sequence[str] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `encode`, but samples that overflow are zeroed and told by the third result, finite (B,) bool."""
        length = self.config.max_length if self.config.padding == "fixed" else max(len(i) for i in ids)
        padded = np.full((len(ids), length), self.pad, dtype=np.int64)
        mask_rows = np.zeros((len(ids), length), dtype=bool)
        for row, one in enumerate(ids):
            if not 0 < len(one) <= self.config.max_length:
                name = names[row] if names else row
                raise ValueError(
                    f"sample {name} has {len(one)} tokens, not 1 to {self.config.max_length}: pretokenize again"
                )
            padded[row, : len(one)] = one
            mask_rows[row, : len(one)] = True
        device = next(self.module.parameters()).device
        mask = torch.from_numpy(mask_rows).to(device)
        if self.config.pads == "seen":
            mask = torch.ones_like(mask)
        hidden = self.module(
            input_ids=torch.from_numpy(padded).to(device), attention_mask=mask.long()
        ).last_hidden_state
        finite = hidden.isfinite().flatten(1).all(1)
        return torch.where(finite[:, None, None], hidden, torch.zeros_like(hidden)), mask, finite

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must say of the features that its connector was trained on."""
        return {
            "model": model_id(self.config.model, self.config.revision),
            "dtype": self.config.dtype,
            "max_length": self.config.max_length,
            "padding": self.config.padding,
            "pads": self.config.pads,
            "layer": "last",
        }
