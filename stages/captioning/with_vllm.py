"""A captioner in this actor, through vLLM: continuous batching on its own GPU or GPUs. Needs the extra `[vllm]`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

from pipeline.fingerprint import model_id

from .engine import Answer, EngineConfig, ahead, decode, not_an_image


@dataclass(frozen=True, kw_only=True)
class VLLMConfig(EngineConfig):
    """Which model, and how much of the GPU it takes. Give the stage's actor whole GPUs, as many as `tensor_parallel_size`."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number type of the weights; `auto` takes the model's own."""
    quantization: str = ""
    """vLLM's name for a way to quantize (`fp8`, `bitsandbytes`); empty does what the model's configuration says."""
    max_model_len: int = 4096
    """Most tokens of prompt, picture and answer together; memory for them is set aside."""
    gpu_memory_utilization: float = 0.9
    """Share of the GPU's memory that vLLM takes."""
    tensor_parallel_size: int = 1
    """GPUs that share one model."""
    batch_size: int = 256
    """Pictures handed over at a time; the next ones are decoded meanwhile."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(
                f"recaption: gpu_memory_utilization must be above 0 and up to 1, got {self.gpu_memory_utilization}"
            )
        if min(self.max_model_len, self.tensor_parallel_size, self.batch_size) < 1:
            raise ValueError("recaption: max_model_len, tensor_parallel_size and batch_size must be at least 1")

    def identity(self) -> dict[str, Any]:
        """Model, number type and what is decoded; not how the work is laid out on GPUs."""
        return {
            "engine": "vllm",
            "model": model_id(self.model, self.revision),
            "dtype": self.dtype,
            "quantization": self.quantization,
            "max_model_len": self.max_model_len,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
        }

    def load(self) -> VLLMEngine:
        """Starts vLLM. Raises ValueError where it is not installed."""
        return VLLMEngine(self)


class VLLMEngine:
    """Hands pictures over as pixels in memory: no URL and no path reaches vLLM, which would fetch it."""

    def __init__(self, config: VLLMConfig) -> None:
        try:
            from vllm import LLM
        except ModuleNotFoundError as error:
            raise ValueError("recaption: the vllm engine needs vLLM: pip install 'densebridge[vllm]'") from error
        self._config = config
        self._answered = False
        self._refusal: ValueError | None = None  # the last one
        self._model = LLM(
            model=config.model,
            revision=config.revision,
            tokenizer_revision=config.revision,
            trust_remote_code=False,
            dtype=config.dtype,
            quantization=config.quantization or None,
            max_model_len=config.max_model_len,
            gpu_memory_utilization=config.gpu_memory_utilization,
            tensor_parallel_size=config.tensor_parallel_size,
            limit_mm_per_prompt={"image": 1},
            load_format="safetensors",
            seed=0,
        )

    def captions(self, images: Sequence[bytes], prompts: Sequence[str], seeds: Sequence[int]) -> list[Answer]:
        """One answer a picture; the next pictures are decoded while vLLM works. Raises vLLM's ValueError where it refuses
        each of the first ones, which is a setting's fault and no row's.
        """
        answers: list[Answer] = []
        for window, opened in ahead(lambda w: decode(images[w]), len(images), self._config.batch_size):
            readable = [row for row, image in enumerate(opened) if image is not None]
            found = self._ask(
                [(opened[row], prompts[window][row], seeds[window][row]) for row in readable]  # type: ignore[misc]
            )
            self._answered = self._answered or any(a.status == "kept" for a in found)
            if self._refusal and not self._answered and len(found) > 1:
                raise self._refusal
            told = dict(zip(readable, found, strict=True))
            answers += [told.get(row) or not_an_image() for row in range(len(opened))]
        return answers

    def _ask(self, asked: list[tuple[Image.Image, str, int]]) -> list[Answer]:
        """The answers. vLLM refuses a whole call for one prompt that is too long for it, so such a call is halved."""
        if not asked:
            return []
        try:
            return self._chat(asked)
        except ValueError as refusal:
            self._refusal = refusal
            if len(asked) == 1:
                return [Answer(status="failed", reason="caption_request_refused")]
        half = len(asked) // 2
        return self._ask(asked[:half]) + self._ask(asked[half:])

    def _chat(self, asked: list[tuple[Image.Image, str, int]]) -> list[Answer]:
        from vllm import SamplingParams

        config = self._config
        talks = [
            [{"role": "user", "content": [{"type": "image_pil", "image_pil": i}, {"type": "text", "text": p}]}]
            for i, p, _ in asked
        ]
        sampling = [
            SamplingParams(temperature=config.temperature, max_tokens=config.max_new_tokens, seed=seed)
            for _, _, seed in asked
        ]
        done = [request.outputs[0] for request in self._model.chat(talks, sampling_params=sampling, use_tqdm=False)]
        return [
            Answer(
                text=one.text, finish="length" if one.finish_reason == "length" else "stop", tokens=len(one.token_ids)
            )
            for one in done
        ]
