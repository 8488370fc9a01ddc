"""Trains the tiny LLaVA: a photo and one of four prompts to the dense caption in that prompt's style.

The vision tower starts from the tiny CLIP's; every weight is then trained, since the language half starts from nothing.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import (
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from ..words import PROMPTS, styled_caption
from ..world import draw_scenes
from .clip import PATCH, SIDE, image_processor, normalised
from .pictures import as_seen
from .tokenizers import llava_tokenizer
from .training import train

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %} {% else %}ASSISTANT: {% for part in message['content'] %}{{ part['text'] }}{% endfor %}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def make_captioner(folder: Path, clip_folder: Path, *, steps: int = 2200, pool: int = 24_000, batch: int = 32) -> None:
    """Builds, trains and saves `LlavaForConditionalGeneration` with its processor into `folder`."""
    torch.manual_seed(3)
    rng = np.random.default_rng(3)
    processor = _processor()
    scenes = draw_scenes(rng, pool, (0.25, 0.3, 0.3, 0.15))
    pixels = as_seen(scenes, rng, SIDE)
    clip = CLIPModel.from_pretrained(clip_folder, dtype=torch.float32)
    model = LlavaForConditionalGeneration(_config(processor, clip.config.vision_config)).train()
    model.model.vision_tower.load_state_dict(clip.vision_model.state_dict(), strict=False)
    prompts = [_prompt(processor, text) for text in PROMPTS]
    end = processor.tokenizer.eos_token

    def loss_at(step: int) -> torch.Tensor:
        rows, styles = rng.integers(pool, size=batch), rng.integers(len(PROMPTS), size=batch)
        answers = [styled_caption(scenes.facts(n), s) + end for n, s in zip(rows, styles, strict=True)]
        texts = [f"{prompts[s]} {a}" for s, a in zip(styles, answers, strict=True)]
        text = processor.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        asked = torch.tensor([len(processor.tokenizer(prompts[s]).input_ids) for s in styles])
        spots = torch.arange(text.input_ids.shape[1])
        told = (spots >= asked[:, None]) & text.attention_mask.bool()
        labels = text.input_ids.masked_fill(~told, -100)
        return model(pixel_values=normalised(pixels[rows]), labels=labels, **text).loss

    train([model], loss_at, name="captioner", steps=steps, rate=1.5e-3)
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)


def _prompt(processor: LlavaProcessor, text: str) -> str:
    """The prompt as text, with as many image tokens as the picture will take."""
    content = [{"type": "image"}, {"type": "text", "text": text}]
    asked = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return str(asked).replace("<image>", "<image>" * (SIDE // PATCH) ** 2)


def _processor() -> LlavaProcessor:
    return LlavaProcessor(
        image_processor(),
        llava_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=TEMPLATE,
    )


def _config(processor: LlavaProcessor, vision: CLIPVisionConfig) -> LlavaConfig:
    tokenizer = processor.tokenizer
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=400,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(SIDE // PATCH) ** 2,
    )
