"""image → caption: a long dense caption by a multimodal language model (LLaVA and its kin), through transformers."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa

from pipeline.fingerprint import model_id
from pipeline.stage import Columns, Needs, Stage


@dataclass(frozen=True, kw_only=True)
class RecaptionConfig:
    """Which model, asked what, and how."""

    model: str
    """Folder or hub name of an image-text-to-text model with a chat template."""
    revision: str | None = None
    """Commit of the hub repository; pin it."""
    prompts: tuple[str, ...] = (
        "Describe this image in detail: the main objects and their surroundings, with colours, textures and places.",
    )
    """What the model is asked; with several, each sample's key chooses one, so that captions vary in style."""
    max_new_tokens: int = 256
    """Longest answer. One that is cut there is shortened to its last whole sentence."""
    min_words: int = 5
    """An answer of fewer words is dropped."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Number type of the weights."""
    device: str = "auto"
    """Where the model runs: `auto` is cuda where there is one."""
    batch_size: int = 16
    """Pictures captioned at a time."""
    needs: Needs = field(default_factory=lambda: Needs(cpus=2.0, gpus=1.0, memory_gb=16))
    """What an actor takes."""

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("recaption needs at least one prompt")


class Recaption(Stage):
    """Reads image; writes caption, which prompt it answers, its length in tokens and why it ended."""

    name = "recaption"
    reads = ("image",)
    writes = pa.schema(
        [("caption", pa.string()), ("prompt", pa.int16()), ("caption_tokens", pa.int32()), ("finish", pa.string())]
    )
    config: RecaptionConfig

    def identity(self) -> Any:
        """The settings, with the model's weights in place of its name."""
        settings = super().identity()
        return {**settings, "model": model_id(self.config.model, self.config.revision), "revision": None}

    def load(self) -> None:
        """Loads model and processor; safetensors only, no remote code."""
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        config = self.config
        device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
        pinned: dict[str, Any] = {"revision": config.revision, "trust_remote_code": False}
        self._processor = AutoProcessor.from_pretrained(config.model, backend="pil", **pinned)
        self._processor.tokenizer.padding_side = "left"
        model = AutoModelForImageTextToText.from_pretrained(
            config.model, dtype=getattr(torch, config.dtype), use_safetensors=True, **pinned
        )
        self._model = model.to(device).eval().requires_grad_(False)
        self._asked = [self._chat(prompt) for prompt in config.prompts]

    def _chat(self, prompt: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        return self._processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def process(self, batch: pa.Table) -> Columns:
        """Captions the batch's pictures greedily."""
        import torch
        from PIL import Image

        images = [Image.open(io.BytesIO(data)).convert("RGB") for data in batch.column("image").to_pylist()]
        chosen = [int(key[-8:], 16) % len(self._asked) for key in batch.column("key").to_pylist()]
        given = self._processor(
            images=images, text=[self._asked[c] for c in chosen], padding=True, return_tensors="pt"
        ).to(self._model.device, self._model.dtype)
        with torch.inference_mode():
            out = self._model.generate(**given, max_new_tokens=self.config.max_new_tokens, do_sample=False)
        answers = out[:, given["input_ids"].shape[1] :]
        ended = (answers == self._end_token).any(dim=1).tolist()
        texts = self._processor.batch_decode(answers, skip_special_tokens=True)
        lengths = (answers != self._pad_token).sum(dim=1).tolist()
        captions = [tidy(text, whole) for text, whole in zip(texts, ended, strict=True)]
        short = [len(caption.split()) < self.config.min_words for caption in captions]
        return {
            "caption": captions,
            "prompt": chosen,
            "caption_tokens": lengths,
            "finish": ["stop" if whole else "length" for whole in ended],
            "status": ["dropped" if s else "kept" for s in short],
            "reason": ["caption_too_short" if s else None for s in short],
        }

    @property
    def _end_token(self) -> int:
        return self._processor.tokenizer.eos_token_id

    @property
    def _pad_token(self) -> int:
        pad = self._processor.tokenizer.pad_token_id
        return self._end_token if pad is None else pad


def tidy(text: str, whole: bool) -> str:
    """The answer on one line; one that was cut ends at its last whole sentence, where it has one."""
    line = " ".join(text.split())
    end = line.rfind(".")
    return line if whole or end < 0 else line[: end + 1]
