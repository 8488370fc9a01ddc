"""Caption upsampling: a small causal language model that has learned to expand, and what happens where one has not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.tokenizer_families import llama
from training.upsampling import ASK, INSTRUCTION, Upsampler, UpsamplerConfig, one_paragraph, problem_of

DENSE = "a big red circle left of the big green square on the left."


@pytest.fixture(scope="module", params=["raw", "chat"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer that has learned two answers by heart: `DENSE` for "red circle", a loop for "green"."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    tokenizer = llama()
    if request.param == "raw":
        tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id, max_position_embeddings=512,
    )  # fmt: skip
    module = LlamaForCausalLM(config)
    asked = upsampler_config(folder)
    module.save_pretrained(folder)
    tokens = asked.load().tokenizer
    rows = []
    for prompt, answer in (("red circle", DENSE), ("green", "a big big big big big big big big big big big")):
        ids = [*tokens.tokenize([prompt + ASK])[0].tolist()]
        rows.append((len(ids), [*ids, *tokenizer(f" {answer}", add_special_tokens=False).input_ids]))
    rows[0][1].append(tokenizer.eos_token_id)
    optimizer = torch.optim.Adam(module.parameters(), lr=5e-3)
    for _ in range(80):
        for start, ids in rows:
            given = torch.tensor([ids])
            module(given, labels=torch.where(torch.arange(len(ids)) < start, -100, given)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    module.save_pretrained(folder)
    return folder


def upsampler_config(folder: Path) -> UpsamplerConfig:
    return UpsamplerConfig(model=str(folder), instruction="Describe: ", words=4, max_new_tokens=24, dtype="float32")


@pytest.fixture(scope="module")
def upsampler(folder: Path) -> Upsampler:
    return upsampler_config(folder).load()


def test_short_prompts_become_dense_and_dense_ones_stay(
    upsampler: Upsampler, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = "the red square left of the circle"
    assert upsampler.expand(["red circle", dense, "", "red  circle "]) == [DENSE, dense, "", DENSE]
    assert capsys.readouterr().out == ""


def test_what_is_no_expansion_is_not_taken(upsampler: Upsampler, capsys: pytest.CaptureFixture[str]) -> None:
    assert upsampler.expand(["green"]) == ["green"]
    assert "the prompt 'green' stays as it is: its expansion is empty" in capsys.readouterr().out  # cut, no sentence
    upsampler.config = replace(upsampler.config, max_new_tokens=1)
    assert upsampler.expand(["red circle"]) == ["red circle"]
    upsampler.config = replace(upsampler.config, max_new_tokens=24)


@pytest.mark.parametrize(
    ("text", "whole", "expected"),
    [
        (" A red cross.\nIt is big.\n", True, "A red cross. It is big."),
        ('"A red cross."', True, "A red cross."),
        ("A red cross. It is 2.5 m wide. And be", False, "A red cross. It is 2.5 m wide."),
        ("A red cross of so many words that", False, ""),
        ("A red cross.\n\nShort: a dog\nDetailed: A d", False, "A red cross."),
        ("A red cross on\nShort: a dog\nDet", False, "A red cross on"),
        ("  \n", True, ""),
        ("Here is the rewritten prompt:\n\nA red cross.\n\nShall I go on?", True, "A red cross."),
        ("Sure! Here is a dense prompt:\nA red cross.", True, "A red cross."),
        ("Here's the prompt: A red cross.", True, "A red cross."),
        ("**The scene:**\n\nA red cross. It is", False, "A red cross."),
        ("Detailed: A red cross.", True, "A red cross."),
        ("**Detailed:** A red cross.", True, "A red cross."),
        ("**Detailed**: A red cross.", True, "A red cross."),
        ("Rewritten prompt: A red cross.", True, "A red cross."),
        ("A sign that says: “open” hangs here.", True, "A sign that says: “open” hangs here."),
        ("<think>\nA cross.\n\nIs it red?\n</think>\n\nA red cross.", True, "A red cross."),
        ("Is it red?\n</think>\n\nDetailed: A red cross.", True, "A red cross."),
        ("<think>\nA cross. Is it red? It may", False, ""),
        ("Here is the rewritten prompt:", True, ""),
    ],
)
def test_the_first_paragraph_counts(text: str, whole: bool, expected: str) -> None:
    assert one_paragraph(text, whole) == expected


def test_problems() -> None:
    assert problem_of("", "a") == "is empty"
    assert problem_of("a cat", "a black cat") == "is no longer than it"
    assert problem_of("a cat and a dog " * 5, "a cat") == "loops"
    assert problem_of("A cat sits on a sofa.", "a cat") == "has 6 words, of at least 12"
    assert problem_of(DENSE, "red circle") is None
    for answer in INSTRUCTION.split("Detailed: ")[1:]:
        assert problem_of(one_paragraph(answer, False), "a cat on a sofa") is None


def test_settings_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"upsampler.model is empty"):
        UpsamplerConfig(model="")
    with pytest.raises(ValueError, match="words 0 and max_new_tokens 160 must be at least 1"):
        UpsamplerConfig(model="m", words=0)
    with pytest.raises(ValueError, match=r"upsampler\.dtype is 'fp8'"):
        UpsamplerConfig(model="m", dtype="fp8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"upsampler\.quantize is '2bit'"):
        UpsamplerConfig(model="m", quantize="2bit")  # type: ignore[arg-type]
    from transformers import T5Config, T5ForConditionalGeneration

    T5ForConditionalGeneration(
        T5Config(vocab_size=8, d_model=8, d_kv=4, num_heads=2, d_ff=8, num_layers=1)
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has an encoder: name a decoder-only language model"):
        UpsamplerConfig(model=str(tmp_path)).load()
