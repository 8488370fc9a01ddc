"""The frozen language model: right encoder, whole cast, honest masks, the empty prompt like any other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.captions import tokenizer_facts
from pipeline.shards import ViewInfo
from tests.training_fixtures import LENGTH, WIDTH, language_model_config, make_language_model
from training.language_models import LanguageModel, LanguageModelConfig, check_view


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    make_language_model(root / "models" / "t5")
    return root


@pytest.fixture(scope="module")
def model(root: Path) -> LanguageModel:
    return language_model_config(root).load()


def test_it_is_the_encoder_that_was_saved_and_frozen(root: Path, model: LanguageModel) -> None:
    from transformers import T5EncoderModel

    assert isinstance(model.module, T5EncoderModel) and model.width == WIDTH
    assert not any(p.requires_grad for p in model.module.parameters()) and not model.module.training
    saved = T5EncoderModel.from_pretrained(root / "models" / "t5").state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.module.state_dict().items())


def test_a_t5_with_decoder_gives_its_encoder(root: Path, tmp_path: Path, model: LanguageModel) -> None:
    from transformers import T5EncoderModel, T5ForConditionalGeneration

    whole = T5ForConditionalGeneration(model.module.config).eval()
    whole.save_pretrained(tmp_path)
    model.tokenizer.bare.save_pretrained(tmp_path)
    loaded = replace(model.config, model=str(tmp_path)).load()
    assert isinstance(loaded.module, T5EncoderModel)
    ids, mask = torch.tensor([[3, 4, 1]]), torch.ones(1, 3, dtype=torch.long)
    expected = whole.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    got = loaded.encode([ids[0].numpy()])[0][:, :3]
    assert torch.allclose(got, expected, atol=1e-5)


def test_clip_text_encoder_alone(tmp_path: Path, model: LanguageModel) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=LENGTH, bos_token_id=3, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    clip = CLIPTextModel(config).eval()
    clip.save_pretrained(tmp_path / "text_encoder")
    model.tokenizer.bare.save_pretrained(tmp_path / "tokenizer")
    apart = LanguageModelConfig(
        model=str(tmp_path / "text_encoder"),
        tokenizer_model=str(tmp_path / "tokenizer"),
        max_length=LENGTH,
        pads="seen",
    )
    hidden, mask = apart.load().encode([np.array([3, 4, 1], dtype=np.int32)])
    assert hidden.shape == (1, LENGTH, 16) and bool(mask.all())
    expected = clip(input_ids=torch.tensor([[3, 4, 1, 0, 0, 0, 0, 0]])).last_hidden_state
    assert torch.allclose(hidden, expected, atol=1e-5)


def test_the_cast_is_whole(root: Path) -> None:
    half = language_model_config(root, dtype="float16").load()
    assert {p.dtype for p in half.module.parameters()} == {torch.float16}
    assert half.encode(half.tokenize(["red round"]))[0].dtype == torch.float16


def test_fixed_and_longest_agree_on_real_tokens(root: Path, model: LanguageModel) -> None:
    ids = model.tokenize(["red round big", "blue"])
    assert [len(one) for one in ids] == [4, 2] and all(one[-1] == 1 for one in ids)
    hidden, mask = model.encode(ids)
    short, short_mask = language_model_config(root, padding="longest").load().encode(ids)
    assert hidden.shape == (2, LENGTH, WIDTH) and short.shape == (2, 4, WIDTH)
    assert mask.sum(1).tolist() == short_mask.sum(1).tolist() == [4, 2]
    assert torch.allclose(hidden[:, :4][short_mask], short[short_mask], atol=1e-5)


def test_the_empty_prompt_is_an_end_token_on_the_same_path(model: LanguageModel) -> None:
    (empty,) = model.tokenize([""])
    assert empty.tolist() == [1]
    alone, among = model.encode([empty]), model.encode([*model.tokenize(["red big"]), empty])
    assert torch.allclose(alone[0][0], among[0][1], atol=1e-5) and torch.equal(alone[1][0], among[1][1])


def test_long_prompts_are_cut_with_their_end_token(model: LanguageModel) -> None:
    (ids,) = model.tokenize(["red " * 50])
    assert len(ids) == LENGTH and ids[-1] == 1
    with pytest.raises(ValueError, match=r"sample key7 has 9 tokens, not 1 to 8"):
        model.encode([np.ones(9, dtype=np.int32)], ["key7"])


def test_overflow_names_its_sample(root: Path) -> None:
    broken = language_model_config(root).load()
    with torch.no_grad():
        broken.module.get_input_embeddings().weight[5] = torch.inf
    ids = [np.array([3, 1]), np.array([5, 1])]
    with pytest.raises(ValueError, match=r"sample b: .* not finite: use bfloat16 or float32"):
        broken.encode(ids, ["a", "b"])
    hidden, _, finite = broken.encode_where_finite(ids)
    assert finite.tolist() == [True, False] and bool(hidden.isfinite().all()) and not hidden[1].any()


def test_a_view_of_other_tokens_is_refused(root: Path) -> None:
    config = language_model_config(root)
    identity = config.load().identity()
    assert {"model", "dtype", "max_length", "padding", "layers"} <= set(identity)
    good = tokenizer_facts(config.prompts)

    def info(**tokens: dict) -> ViewInfo:
        return ViewInfo(
            view="512", version="1", resolution=8, samples=1, manifest="m", manifest_sha256="s", tokenizers=tokens
        )

    check_view(config, info(t5=good))
    with pytest.raises(ValueError, match=r"view '512' has no tokens 't5' \(it has: clip\)"):
        check_view(config, info(clip=good))
    with pytest.raises(ValueError, match=r"were made by other, the language model's tokenizer is"):
        check_view(config, info(t5=good | {"id": "other"}))
    with pytest.raises(
        ValueError, match=r"were made with max_length 77, language_model.max_length is 8: make them equal"
    ):
        check_view(config, info(t5=good | {"max_length": 77}))
    with pytest.raises(ValueError, match=r"were made with instruction 'Draw ', language_model.instruction is ''"):
        check_view(config, info(t5=good | {"instruction": "Draw "}))
    with pytest.raises(ValueError, match=r"were made with template 'chat', language_model.template is 'raw'"):
        check_view(config, info(t5=good | {"template": "chat"}))
    check_view(config, info(t5=good | {"captions": [["short", 1.0]]}))
