"""Language models of every family: the real classes, tiny and untrained, saved as the hub has them, with tokenizers made here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.tokenizer_families import bert, clip, gemma, llama, qwen2, t5

WIDTH = 16
DEPTH = 3
"""Layers of each; `make_language_model(..., layers=…)` makes another number."""


def make_language_model(folder: Path, family: str, *, layers: int = DEPTH, width: int = WIDTH) -> Path:
    """Saves the family's model, decoder and head included where the hub has them, with its tokenizer; random but fixed."""
    make, tokenizer = FAMILIES[family]
    words = tokenizer()
    torch.manual_seed(5)
    special = {
        "pad_token_id": words.pad_token_id,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
    }
    model = make(special | {"vocab_size": len(words)}, layers, width)
    with torch.no_grad():  # untrained weights are so small that attention, and so what it may see, hardly matters
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                torch.nn.init.normal_(weight, std=1.5 * weight.shape[1] ** -0.5)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def _t5(words: dict[str, Any], layers: int, width: int) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            **words, d_model=width, d_kv=8, num_heads=2, d_ff=32, num_layers=layers, num_decoder_layers=1,
            feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0,
        )
    )  # fmt: skip


def _t5gemma(words: dict[str, Any], layers: int, width: int) -> Any:
    from transformers import T5GemmaConfig, T5GemmaForConditionalGeneration, T5GemmaModuleConfig

    both = words | {
        "hidden_size": width, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
        "max_position_embeddings": 64, "sliding_window": 4,
    }  # fmt: skip
    encoder, decoder = (T5GemmaModuleConfig(**both, num_hidden_layers=number) for number in (layers, 1))
    return T5GemmaForConditionalGeneration(T5GemmaConfig(encoder=encoder, decoder=decoder, **words))


def _clip(words: dict[str, Any], layers: int, width: int) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            **words, hidden_size=width, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2,
            max_position_embeddings=77,
        )
    )  # fmt: skip


def _bert(words: dict[str, Any], layers: int, width: int) -> Any:
    from transformers import BertConfig, BertForMaskedLM

    words = {**words, "bos_token_id": None, "eos_token_id": None}
    return BertForMaskedLM(
        BertConfig(
            **words, hidden_size=width, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2,
            max_position_embeddings=32,
        )
    )  # fmt: skip


def _decoder(name: str, **more: Any) -> Callable[[dict[str, Any], int, int], Any]:
    def make(words: dict[str, Any], layers: int, width: int) -> Any:
        import transformers

        config = getattr(transformers, f"{name}Config")(
            **words, hidden_size=width, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64, **more,
        )  # fmt: skip
        return getattr(transformers, f"{name}ForCausalLM")(config)

    return make


FAMILIES: dict[str, tuple[Callable[[dict[str, Any], int, int], Any], Callable[[], Any]]] = {
    "clip": (_clip, clip),
    "bert": (_bert, bert),
    "t5": (_t5, t5),
    "t5gemma": (_t5gemma, gemma),
    "llama": (_decoder("Llama"), llama),
    "qwen2": (_decoder("Qwen2"), qwen2),
    "qwen3": (_decoder("Qwen3", head_dim=8), qwen2),
    "gemma2": (_decoder("Gemma2", head_dim=8, sliding_window=4), gemma),
}
"""The maker of each family's model, and of its tokenizer."""
KINDS = {
    "encoder": ("clip", "bert"),
    "encoder-decoder": ("t5", "t5gemma"),
    "decoder": ("llama", "qwen2", "qwen3", "gemma2"),
}
"""The families by what the papers tell apart."""
