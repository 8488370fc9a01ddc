"""Trains the tiny T5: from a dense caption in any phrasing and order to its canonical ordered form, with tagging beside it.

Paraphrasing alone stays on a plateau for thousands of steps (every word right but which colour goes where: 8 % of scenes
after 5,500), and a connector on such features places objects well and colours them at chance. So the encoder is also
asked, at every word of an object's sentence, for that object's place, colour, shape and size: what a large language
model's features tell anyway. The tagging head is thrown away.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import T5Config, T5ForConditionalGeneration, T5TokenizerFast

from ..oracle import read_caption
from ..words import dense_caption, ordered_caption
from ..world import COLOURS, PLACES, SHAPES, SIZES, draw_scenes
from .tokenizers import t5_tokenizer
from .training import train

SHARES = (0.2, 0.3, 0.3, 0.2)
TAGS = {"place": PLACES, "colour": tuple(COLOURS), "shape": SHAPES, "size": SIZES}


def make_language_model(folder: Path, *, steps: int = 1500, batch: int = 48, tagging: float = 0.5) -> None:
    """Builds, trains and saves `T5ForConditionalGeneration` with its tokenizer into `folder`; `tagging` is the weight of the
    second task.
    """
    torch.manual_seed(2)
    rng = np.random.default_rng(2)
    tokenizer = t5_tokenizer()
    model = T5ForConditionalGeneration(_config(len(tokenizer))).train()
    head = nn.Linear(model.config.d_model, sum(map(len, TAGS.values())))

    def loss_at(step: int) -> torch.Tensor:
        scenes = draw_scenes(rng, batch, SHARES)
        facts = [scenes.facts(n) for n in range(batch)]
        tagged = [tagged_ids(tokenizer, dense_caption(f, rng)) for f in facts]
        given = tokenizer.pad({"input_ids": [ids for ids, _ in tagged]}, return_tensors="pt")
        tags = pad_sequence([torch.tensor(t) for _, t in tagged], batch_first=True, padding_value=-100)
        labels = tokenizer([ordered_caption(f) for f in facts], padding=True, return_tensors="pt").input_ids
        out = model(**given, labels=labels.masked_fill(labels == tokenizer.pad_token_id, -100))
        scores = head(out.encoder_last_hidden_state).split([len(v) for v in TAGS.values()], dim=-1)
        tag_losses = [cross_entropy(s.flatten(0, 1), tags[..., k].flatten()) for k, s in enumerate(scores)]
        return out.loss + tagging * torch.stack(tag_losses).mean()

    train([model, head], loss_at, name="t5", steps=steps, rate=1e-3, decay_from=0.4)
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tagged_ids(tokenizer: T5TokenizerFast, caption: str) -> tuple[list[int], list[list[int]]]:
    """Token ids of a caption, and at every token the tags of the object that its sentence describes (-100: of none)."""
    ids: list[int] = []
    tags: list[list[int]] = []
    for sentence in re.findall(r"[^.]+\.", caption):
        words = tokenizer(sentence.strip(), add_special_tokens=False).input_ids
        things = read_caption(sentence).things
        tag = [names.index(getattr(things[0], kind)) for kind, names in TAGS.items()] if things else [-100] * len(TAGS)
        ids += words
        tags += [tag] * len(words)
    return [*ids, tokenizer.eos_token_id], [*tags, [-100] * len(TAGS)]


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
