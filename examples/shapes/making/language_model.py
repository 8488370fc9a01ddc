"""Trains the tiny T5: from a dense caption in any phrasing and order to its canonical ordered form.

The decoder has one layer, so the binding of colour, size and shape to a place has to happen in the encoder, which is the
part that the connector reads. A fifth of the batches are span-like denoising (every sixth word masked).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import T5Config, T5ForConditionalGeneration

from ..words import base_caption, dense_caption, ordered_caption
from ..world import draw_scenes
from .tokenizers import t5_tokenizer
from .training import train

SHARES = (0.2, 0.3, 0.3, 0.2)


def make_language_model(folder: Path, *, steps: int = 9000, batch: int = 48) -> None:
    """Builds, trains and saves `T5ForConditionalGeneration` with its tokenizer into `folder`."""
    torch.manual_seed(2)
    rng = np.random.default_rng(2)
    tokenizer = t5_tokenizer()
    model = T5ForConditionalGeneration(_config(len(tokenizer))).train()
    sentinel = tokenizer.convert_tokens_to_ids("<extra_id_0>")

    def loss_at(step: int) -> torch.Tensor:
        scenes = draw_scenes(rng, batch, SHARES)
        facts = [scenes.facts(n) for n in range(batch)]
        if rng.random() < 0.1:
            texts = [base_caption(f, rng) for f in facts]
            given = tokenizer(texts, padding=True, return_tensors="pt")
            labels = given.input_ids.clone()
            hidden = torch.from_numpy(rng.random(tuple(labels.shape)) < 0.17) & (labels > 2)
            given["input_ids"] = given.input_ids.masked_fill(hidden, sentinel)
        else:
            given = tokenizer([dense_caption(f, rng) for f in facts], padding=True, return_tensors="pt")
            labels = tokenizer([ordered_caption(f) for f in facts], padding=True, return_tensors="pt").input_ids
        labels = labels.masked_fill(labels == tokenizer.pad_token_id, -100)
        return model(**given, labels=labels).loss

    train([model], loss_at, name="t5", steps=steps, rate=1.5e-3, decay_from=0.4)
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _config(vocab: int) -> T5Config:
    return T5Config(
        vocab_size=vocab,
        d_model=128,
        d_kv=32,
        num_heads=4,
        d_ff=256,
        num_layers=4,
        num_decoder_layers=1,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=64,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
