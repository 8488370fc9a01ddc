"""Trains the tiny CLIP: contrastive loss on photos and captions of every kind (dense, base-like, alt), one kind a batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from ..words import alt_text, base_caption, dense_caption
from ..world import draw_scenes
from .pictures import as_seen
from .tokenizers import clip_tokenizer
from .training import train

SIDE, PATCH, WIDTH = 24, 6, 128


def image_processor() -> CLIPImageProcessor:
    """Short edge to 24 by bicubic, centre crop, to [-1, 1]."""
    return CLIPImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def normalised(pictures: np.ndarray) -> torch.Tensor:
    """uint8 (N, side, side, 3) to float32 (N, 3, side, side) in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def make_clip(folder: Path, *, steps: int = 900, pool: int = 20_000, batch: int = 128) -> None:
    """Builds, trains and saves `CLIPModel` with its processor into `folder`."""
    torch.manual_seed(1)
    rng = np.random.default_rng(1)
    tokenizer = clip_tokenizer()
    scenes = draw_scenes(rng, pool, (0.4, 0.25, 0.2, 0.15))
    pixels = as_seen(scenes, rng, SIDE)
    model = CLIPModel(_config(len(tokenizer))).train()

    def loss_at(step: int) -> torch.Tensor:
        rows = rng.integers(pool, size=batch)
        write = (dense_caption, base_caption, alt_text)[rng.choice(3, p=[0.5, 0.35, 0.15])]
        texts = [write(scenes.facts(n), rng) for n in rows]
        text = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        out = model(pixel_values=normalised(pixels[rows]), return_loss=True, **text)
        return out.loss

    train([model], loss_at, name="clip", steps=steps, rate=1e-3)
    model.half().save_pretrained(folder)
    CLIPProcessor(image_processor(), tokenizer).save_pretrained(folder)


def _config(vocab: int) -> CLIPConfig:
    tower = dict(hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=3, num_attention_heads=4)
    text = dict(vocab_size=vocab, max_position_embeddings=77, bos_token_id=0, eos_token_id=1, pad_token_id=1, **tower)
    vision = dict(image_size=SIDE, patch_size=PATCH, **tower)
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)
