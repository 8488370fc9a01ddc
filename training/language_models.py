"""The frozen language model: token ids to the hidden states that a connector reads."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.captions import CaptionTokenizer, load_tokenizer, prompt_facts
from pipeline.quantization import quantization_of
from pipeline.shards import ViewInfo
from pipeline.text_models import (
    depth_of,
    hidden_states,
    hidden_states_behind,
    load_text_model,
    positions_of,
    width_of,
)

from .configuration import LanguageModelConfig
from .lora import add_lora


def load_language_model(config: LanguageModelConfig) -> LanguageModel:
    """Tokenizer and frozen model, on the CPU; a quantized one on the process's GPU. Raises OSError or ValueError that says what
    is missing.
    """
    quantization = quantization_of(config.quantize, config.dtype, "language_model.quantize")
    module = load_text_model(config.model, config.revision, config.subfolder, config.dtype, quantization)
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
        self.depth = depth_of(module) if config.layers == "all" else 1
        """Hidden states that `encode` gives for each token."""
        self.lora: dict[str, nn.Module] = {}
        """What is trained in it, as `add_lora` gave it; empty where the settings ask for none."""
        self._check_layers()
        self._check_positions(tokenizer.limit, "set language_model.max_length to that")

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.module.parameters()).device

    def to(self, device: torch.device | str) -> LanguageModel:
        """Moves the weights, but for quantized ones, which stay on their GPU; returns itself."""
        if self.config.quantize == "none":
            with torch.inference_mode(False):  # weights moved in inference mode could not be trained through afterwards
                self.module.to(device)
        return self

    @contextmanager
    def on(self, device: torch.device | str) -> Iterator[LanguageModel]:
        """Inside, the weights are on `device`; afterwards they are where they were, and their memory is the denoiser's."""
        before = self.device
        try:
            yield self.to(device)
        finally:
            self.to(before)

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
        """Token ids (length,) each -> hidden states (B, L, width) in the model's dtype, mask (B, L) bool; (B, depth, L, width)
        where all layers are asked for. They are those of `config.layers`.

        Learned embeddings `appended` (N, width) are read right behind each prompt's last token: the hidden states are then
        those at their N places, and the mask hides none. Gradients flow to them, and to the LoRA where there is one.
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
        """As `encode`, but samples that overflow are zeroed and told by the third result, finite (B,) bool.

        What transformers itself clamps inside a T5 in float16 (as under ELLA's own code) comes out finite, and is not told.
        """
        limit = self.tokenizer.limit
        for row, one in enumerate(ids):
            if not 0 < len(one) <= limit:
                name = names[row] if names else row
                raise ValueError(f"sample {name} has {len(one)} tokens, not 1 to {limit}: pretokenize again")
        hidden, mask = self._read(ids, appended)
        finite = hidden.detach().isfinite().flatten(1).all(1)
        if hidden.requires_grad and not bool(finite.all()):
            # A gradient of zero times an infinite value is not a number: another prompt stands in for what overflowed.
            other = ids[int(finite.nonzero()[0, 0])] if bool(finite.any()) else self.tokenize([""])[0]
            hidden, mask = self._read([one if good else other for one, good in zip(ids, finite, strict=True)], appended)
        kept = finite.view(-1, *[1] * (hidden.ndim - 1))
        return torch.where(kept, hidden, torch.zeros_like(hidden)), mask, finite

    def check_appended(self, number: int) -> None:
        """Raises ValueError when the model cannot read `number` learned embeddings behind its prompts."""
        name = f"{self.config.model} ({type(self.module).__name__})"
        if "inputs_embeds" not in inspect.signature(self.module.forward).parameters:
            raise ValueError(f"{name} reads token ids alone: learned queries need another model, as T5, BERT or Llama")
        found = self.module.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
        if found != self.width:
            raise ValueError(
                f"{name} has embeddings of width {found}, hidden states of {self.width}: take another model"
            )
        self._check_positions(
            self.tokenizer.limit + number, f"lower language_model.max_length, or the {number} queries behind the prompt"
        )

    def _read(self, ids: Sequence[np.ndarray], appended: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        config = self.config
        if appended is not None:
            self.check_appended(len(appended))
            hidden = hidden_states_behind(self.module, ids, appended, pad=self.pad, layers=config.layers)
            return hidden, torch.ones(len(ids), len(appended), dtype=torch.bool, device=hidden.device)
        length = self.tokenizer.limit if config.padding == "fixed" else max(len(one) for one in ids)
        return hidden_states(
            self.module,
            ids,
            length=length,
            pad=self.pad,
            pads=config.pads,
            layers=config.layers,
            gradient=bool(self.lora),
        )

    def _check_layers(self) -> None:
        layers, depth = self.config.layers, depth_of(self.module)
        if isinstance(layers, int) and not -depth - 1 <= layers <= depth:
            raise ValueError(
                f"language_model.layers is {layers}, {self.config.model} has {depth}: choose a number from 0 (the embeddings) "
                f"to {depth}, or from -1 (the last) to {-depth - 1}"
            )

    def _check_positions(self, length: int, remedy: str) -> None:
        positions = positions_of(self.module)
        if positions is not None and length > positions:
            raise ValueError(f"{self.config.model} reads at most {positions} tokens, asked for {length}: {remedy}")

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must say of the features that its connector was trained on."""
        return self.config.identity()
