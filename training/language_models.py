"""The frozen language model: token ids to the hidden states that a connector reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.captions import CaptionTokenizer, load_tokenizer, prompt_facts
from pipeline.fingerprint import model_id, plain
from pipeline.shards import ViewInfo
from pipeline.text_models import hidden_states, load_text_model, width_of

from .configuration import LanguageModelConfig
from .lora import add_lora


def load_language_model(config: LanguageModelConfig) -> LanguageModel:
    """Tokenizer and frozen model, on the CPU. Raises OSError or ValueError that says what is missing."""
    module = load_text_model(config.model, config.revision, config.subfolder, config.dtype)
    language_model = LanguageModel(config, load_tokenizer(config.prompts), module)
    if config.lora:
        language_model.lora = add_lora(module, config.lora, config.model)
    return language_model


def check_view(config: LanguageModelConfig, info: ViewInfo) -> None:
    """Raises ValueError when the view's tokens are not those that this language model's tokenizer would make."""
    found = info.tokenizers.get(config.tokenizer)
    where = f"view {info.view!r}"
    if found is None:
        names = ", ".join(sorted(info.tokenizers)) or "none"
        raise ValueError(f"{where} has no tokens {config.tokenizer!r} (it has: {names}): set language_model.tokenizer")
    wanted = prompt_facts(config.prompts)
    if found["id"] != wanted["id"]:
        raise ValueError(
            f"{where}: tokens {config.tokenizer!r} were made by {found['id']}, the language model's tokenizer is "
            f"{wanted['id']}: pretokenize with {config.prompts.model} and pack again"
        )
    for name, value in wanted.items():
        if found.get(name) != value:
            raise ValueError(
                f"{where}: tokens {config.tokenizer!r} were made with {name} {found.get(name)!r}, language_model.{name} "
                f"is {value!r}: make them equal"
            )


class LanguageModel:
    """A frozen language model with its tokenizer."""

    def __init__(self, config: LanguageModelConfig, tokenizer: CaptionTokenizer, module: nn.Module) -> None:
        self.config, self.tokenizer, self.module = config, tokenizer, module
        self.pad = tokenizer.pad
        self.width = width_of(module)
        """Width of the hidden states."""
        self.lora: dict[str, nn.Module] = {}
        """What is trained in it, as `add_lora` gave it; empty where the settings ask for none."""

    def to(self, device: torch.device | str) -> LanguageModel:
        """Moves the weights; returns itself."""
        self.module.to(device)
        return self

    def tokenize(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of the prompts with the template's and the end token, cut at `max_length`, not padded: (length,) each."""
        return self.tokenizer.tokenize(texts)

    def encode(
        self,
        ids: Sequence[np.ndarray],
        names: Sequence[str] | None = None,
        *,
        appended: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids (length,) each -> last hidden state (B, L, width) in the model's dtype, mask (B, L) bool.

        Raises ValueError naming the first sample (`names`, else its number) that is too long or that overflows.
        """
        hidden, mask, finite = self.encode_where_finite(ids, names, appended=appended)
        if not bool(finite.all()):
            bad = int((~finite).nonzero()[0, 0])
            raise ValueError(
                f"sample {names[bad] if names else bad}: {self.config.model} in {self.config.dtype} gives values that "
                "are not finite: use bfloat16 or float32"
            )
        return hidden, mask

    def encode_where_finite(
        self,
        ids: Sequence[np.ndarray],
        names: Sequence[str] | None = None,
        *,
        appended: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `encode`, but samples that overflow are zeroed and told by the third result, finite (B,) bool."""
        limit = self.tokenizer.limit
        for row, one in enumerate(ids):
            if not 0 < len(one) <= limit:
                name = names[row] if names else row
                raise ValueError(f"sample {name} has {len(one)} tokens, not 1 to {limit}: pretokenize again")
        length = limit if self.config.padding == "fixed" else max(len(i) for i in ids)
        hidden, mask = hidden_states(self.module, ids, length=length, pad=self.pad, pads=self.config.pads)
        finite = hidden.isfinite().flatten(1).all(1)
        return torch.where(finite[:, None, None], hidden, torch.zeros_like(hidden)), mask, finite

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must say of the features that its connector was trained on."""
        return {
            "model": model_id(self.config.model, self.config.revision),
            "dtype": self.config.dtype,
            "max_length": self.config.max_length,
            "template": self.config.template,
            "instruction": self.config.instruction,
            "padding": self.config.padding,
            "pads": self.config.pads,
            "layers": self.config.layers,
            "quantize": self.config.quantize,
            "lora": plain(self.config.lora) if self.config.lora else None,
        }
