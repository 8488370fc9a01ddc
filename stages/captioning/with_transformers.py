"""A captioner in this process, through transformers: LLaVA, LLaVA-NeXT, Qwen-VL and whatever else has a chat template."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.devices import device_of
from pipeline.fingerprint import model_id
from pipeline.quantization import quantization_of

from .engine import Answer, EngineConfig, ahead, decode, not_an_image


@dataclass(frozen=True, kw_only=True)
class TransformersConfig(EngineConfig):
    """Which model, and how it runs."""

    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Number type of the weights; of what is computed, where the weights are quantized."""
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """Weights in 8 bits (LLM.int8) or 4 (NF4) take a half or a quarter of the memory. Needs bitsandbytes and a GPU."""
    compile: bool = False
    """A cache of fixed size, with which transformers compiles the decoding step on a GPU: minutes at first, faster after."""
    device: str = "auto"
    """Where the model runs: `auto` is cuda where there is one."""
    batch_size: int = 16
    """Pictures captioned together; halved by itself where memory runs out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 1:
            raise ValueError(f"recaption: engine.batch_size must be at least 1, got {self.batch_size}")

    def identity(self) -> dict[str, Any]:
        """Model, number type and what is decoded. Neither device nor batch nor compilation is meant to change a caption."""
        return {
            "engine": "transformers",
            "model": model_id(self.model, self.revision),
            "dtype": self.dtype,
            "quantization": self.quantization,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
        }

    def load(self) -> TransformersEngine:
        """Loads model and processor; safetensors only, no remote code."""
        return TransformersEngine(self)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A batch as the model takes it."""

    rows: list[int]
    """Which of the batch's pictures are in it: those that could be read."""
    inputs: Any
    """The processor's tensors, on the CPU; None where no picture could be read."""


class TransformersEngine:
    """Captions batch after batch; the next one's pictures are decoded while the model works on the present one."""

    def __init__(self, config: TransformersConfig) -> None:
        import torch
        from transformers import AutoModelForImageTextToText

        self._config = config
        device = device_of(config.device)
        pinned: dict[str, Any] = {"revision": config.revision, "trust_remote_code": False}
        self._processor = _processor(config.model, pinned)
        # Its own tokenizer to decode with: a fast tokenizer must not be used by two threads.
        self._tokenizer = copy.deepcopy(self._processor.tokenizer)
        self._model = AutoModelForImageTextToText.from_pretrained(
            config.model,
            dtype=getattr(torch, config.dtype),
            attn_implementation="sdpa",
            use_safetensors=True,
            device_map={"": device},
            quantization_config=quantization_of(config.quantization, config.dtype, "recaption: engine.quantization"),
            **pinned,
        ).eval()
        self._model.requires_grad_(False)
        self._ends = _end_tokens(self._model, self._tokenizer)
        self._size = config.batch_size

    def captions(self, images: Sequence[bytes], prompts: Sequence[str], seeds: Sequence[int]) -> list[Answer]:
        """One answer a picture. Where memory runs out the batches are halved, for good; raises torch's OutOfMemoryError
        where it does not do for one picture.
        """
        answers: list[Answer] = []
        for window, prepared in ahead(lambda w: self.prepare(images[w], prompts[w]), len(images), self._size):
            answers += self._answers(images[window], prompts[window], seeds[window], prepared)
        return answers

    def prepare(self, images: Sequence[bytes], prompts: Sequence[str]) -> Prepared:
        """The pictures decoded and, with their prompts, made into tensors."""
        opened = decode(images)
        rows = [row for row, image in enumerate(opened) if image is not None]
        talks = [
            [
                {
                    "role": "user",
                    "content": [{"type": "image", "image": opened[row]}, {"type": "text", "text": prompts[row]}],
                }
            ]
            for row in rows
        ]
        if not talks:
            return Prepared(rows=[], inputs=None)
        inputs = self._processor.apply_chat_template(
            talks,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs={"padding": True, "return_tensors": "pt"},
        )
        return Prepared(rows=rows, inputs=inputs)

    def generate(self, prepared: Prepared, seeds: Sequence[int]) -> list[Answer]:
        """The model's answers to a prepared batch, one for each of `seeds`."""
        import torch

        answers = [not_an_image() for _ in seeds]
        if not prepared.rows:
            return answers
        config, ends = self._config, self._ends
        given = prepared.inputs.to(self._model.device, self._model.dtype)
        pad = self._tokenizer.pad_token_id
        with torch.inference_mode():
            out = self._model.generate(
                **given,
                max_new_tokens=config.max_new_tokens,
                do_sample=False,
                eos_token_id=ends,
                pad_token_id=ends[0] if pad is None else pad,
                logits_processor=self._drawing([seeds[row] for row in prepared.rows]),
                cache_implementation="static" if config.compile else None,
            )
        written = out[:, given["input_ids"].shape[1] :].cpu()
        ended = torch.isin(written, torch.tensor(ends))
        lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, written.shape[1]).tolist()
        for row, tokens, length, whole in zip(prepared.rows, written, lengths, ended.any(1).tolist(), strict=True):
            text = self._tokenizer.decode(tokens[:length], skip_special_tokens=True)
            answers[row] = Answer(text=text, finish="stop" if whole else "length", tokens=length)
        return answers

    def _answers(
        self, images: Sequence[bytes], prompts: Sequence[str], seeds: Sequence[int], prepared: Prepared | None = None
    ) -> list[Answer]:
        """The answers to one batch, or to its halves where it does not fit into memory."""
        import torch

        if len(images) <= self._size:
            try:
                return self.generate(prepared or self.prepare(images, prompts), seeds)
            except torch.OutOfMemoryError:
                if len(images) == 1:
                    raise
                self._size = len(images) // 2
            if torch.cuda.is_available():  # outside of the handler, whose traceback holds the batch's tensors
                torch.cuda.empty_cache()
        half = (len(images) + 1) // 2
        parts = (slice(0, half), slice(half, None))
        return [a for part in parts for a in self._answers(images[part], prompts[part], seeds[part])]

    def _drawing(self, seeds: Sequence[int]) -> Any:
        """What makes the likeliest token a drawn one: noise of Gumbel's distribution on logits divided by the temperature
        (Gumbel 1954; its argmax is a draw from their softmax). Each row has its own generator, so that a caption does not
        depend on what else is in the batch.
        """
        if not self._config.temperature:
            return None
        import torch
        from transformers import LogitsProcessorList

        generators = [torch.Generator().manual_seed(seed) for seed in seeds]

        def draw(_: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            noise = torch.stack([torch.empty(logits.shape[1]).exponential_(generator=g) for g in generators])
            return logits.float() / self._config.temperature - noise.log().to(logits.device)

        return LogitsProcessorList([draw])


def _processor(model: str, pinned: dict[str, Any]) -> Any:
    """The model's processor, its pictures on one fixed backend: two backends give different pixels."""
    from transformers import AutoImageProcessor, AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(model, **pinned)
    except ImportError as error:  # of a video processor, which Qwen-VL has, or of another model's own needs
        raise ValueError(
            f"recaption: the processor of {model} needs a library that is missing, torchvision as a rule: "
            "pip install 'densebridge[vision]'"
        ) from error
    # Set afterwards, for a processor that has one for videos as well would ask that for the same backend, and fail.
    processor.image_processor = AutoImageProcessor.from_pretrained(model, backend="pil", **pinned)
    processor.tokenizer.padding_side = "left"
    return processor


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """All tokens that end an answer: a chat model's configuration may name several."""
    said = model.generation_config.eos_token_id
    ends = said if isinstance(said, list) else [said]
    return [end for end in ends if end is not None] or [tokenizer.eos_token_id]
