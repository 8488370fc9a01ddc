"""The vLLM engine against a stand-in for its library, which a machine without a GPU cannot have: what it is handed, and what
becomes of what it says. The stand-in has the names and arguments of vLLM's sources; that vLLM takes them is not tested here.
"""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from stages.captioning.engine import Answer, not_an_image
from stages.captioning.with_vllm import VLLMConfig

CONFIG = VLLMConfig(model="m", revision="abc", max_new_tokens=50, batch_size=3)


def picture(shade: int) -> bytes:
    out = io.BytesIO()
    Image.new("L", (8, 6), shade).save(out, "PNG")
    return out.getvalue()


@dataclass
class SamplingParams:
    temperature: float
    max_tokens: int
    seed: int | None = None


class LLM:
    """Answers with what it sees; refuses a call with a prompt that is too long, as vLLM does."""

    def __init__(
        self, model: str, *, revision: str | None, tokenizer_revision: str | None, trust_remote_code: bool, dtype: str,
        quantization: str | None, max_model_len: int, gpu_memory_utilization: float, tensor_parallel_size: int,
        limit_mm_per_prompt: dict[str, int], load_format: str, seed: int,
    ) -> None:  # fmt: skip
        assert not trust_remote_code and limit_mm_per_prompt == {"image": 1} and load_format == "safetensors"
        assert (model, revision, tokenizer_revision, quantization) == ("m", "abc", "abc", None)
        self.calls: list[int] = []

    def chat(self, messages: list[Any], sampling_params: list[SamplingParams], use_tqdm: bool = True) -> list[Any]:
        self.calls.append(len(messages))
        if any("too long" in talk[0]["content"][1]["text"] for talk in messages):
            raise ValueError("The decoder prompt is longer than the maximum model length")
        return [self._one(talk[0]["content"], given) for talk, given in zip(messages, sampling_params, strict=True)]

    def _one(self, content: list[dict[str, Any]], given: SamplingParams) -> SimpleNamespace:
        image, text = content[0]["image_pil"], content[1]["text"]
        assert content[0]["type"] == "image_pil" and isinstance(image, Image.Image) and image.mode == "RGB"
        said = f"{text} {image.getpixel((0, 0))[0]} {given.seed}"
        cut = given.max_tokens < len(said)
        return SimpleNamespace(
            outputs=[SimpleNamespace(text=said, token_ids=list(said), finish_reason="length" if cut else "stop")]
        )


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SamplingParams  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)


def test_pictures_go_to_vllm_as_pixels_and_come_back_in_order(vllm: None) -> None:
    engine = CONFIG.load()
    images = [picture(10), b"broken", picture(20), picture(30), b"", picture(40)]
    found = engine.captions(images, list("abcdef"), list(range(6)))
    said = {0: "a 10 0", 2: "c 20 2", 3: "d 30 3", 5: "f 40 5"}
    assert found == [Answer(text=said[n], finish="stop", tokens=6) if n in said else not_an_image() for n in range(6)]
    assert engine._model.calls == [2, 2]
    cut = replace(CONFIG, max_new_tokens=3).load().captions(images[:1], ["a"], [0])
    assert cut[0].finish == "length"


def test_a_prompt_that_vllm_refuses_fails_alone(vllm: None) -> None:
    found = CONFIG.load().captions([picture(1)] * 3, ["a", "too long", "b"], [0] * 3)
    assert [a.reason for a in found] == [None, "caption_request_refused", None]


def test_where_vllm_refuses_all_of_the_first_pictures_its_error_is_told(vllm: None) -> None:
    with pytest.raises(ValueError, match="longer than the maximum model length"):
        CONFIG.load().captions([b"broken", *[picture(1)] * 6], ["too long"] * 7, [0] * 7)
    engine = CONFIG.load()
    assert engine.captions([picture(1)], ["a"], [0])[0].status == "kept"
    found = engine.captions([picture(1)] * 3, ["too long"] * 3, [0] * 3)
    assert [a.reason for a in found] == ["caption_request_refused"] * 3


def test_without_vllm_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match=r"needs vLLM: pip install 'densebridge\[vllm\]'"):
        CONFIG.load()


@pytest.mark.parametrize(
    "wrong", [{"gpu_memory_utilization": 0.0}, {"tensor_parallel_size": 0}, {"max_model_len": 0}, {"batch_size": 0}]
)
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="recaption: "):
        replace(CONFIG, **wrong)


def test_how_work_is_laid_out_is_not_in_the_identity() -> None:
    laid_out = replace(CONFIG, tensor_parallel_size=4, gpu_memory_utilization=0.5, batch_size=9)
    assert laid_out.identity() == CONFIG.identity() != replace(CONFIG, quantization="fp8").identity()
