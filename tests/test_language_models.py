"""The frozen language model: right encoder, whole cast, honest masks, the empty prompt like any other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.captions import tokenizer_facts
from pipeline.shards import ViewInfo
from tests.tiny_language_models import DEPTH, FAMILIES
from tests.tiny_language_models import make_language_model as make_family
from tests.training_fixtures import LENGTH, WIDTH, language_model_config, make_language_model
from training.bridge import LayerWeights
from training.configuration import check_connector
from training.connectors import QueriesConfig, TSCConfig
from training.language_models import LanguageModel, LanguageModelConfig, check_view
from training.parts import check_widths


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    make_language_model(root / "models" / "t5")
    for family in FAMILIES:
        make_family(root / family, family)
    return root


PROMPTS = ["a red circle left of the square", "big", ""]
QUERIES = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(4))


def of_family(root: Path, family: str, **changes: Any) -> LanguageModel:
    """A tiny model of the family, whose prompts have at most 24 tokens."""
    settings: dict[str, Any] = {"model": str(root / family), "max_length": 24, "padding": "longest"}
    return LanguageModelConfig(**settings | changes).load()


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


@pytest.mark.parametrize("layers", ["last", "mean", "all", 0, 1, -2])
@pytest.mark.parametrize("family", ["clip", "t5gemma", "llama"])
def test_layers_of_a_batch_are_those_of_each_prompt(root: Path, family: str, layers: Any) -> None:
    language_model = of_family(root, family, layers=layers)
    ids = language_model.tokenize(PROMPTS)
    hidden, mask = language_model.encode(ids)
    longest = max(len(one) for one in ids)
    assert language_model.depth == (DEPTH if layers == "all" else 1)
    assert hidden.shape == (3, *([DEPTH] if layers == "all" else []), longest, WIDTH) and not hidden.requires_grad
    assert mask.shape == (3, longest) and mask.sum(1).tolist() == [len(one) for one in ids]
    for row, one in enumerate(ids):
        assert torch.allclose(language_model.encode([one])[0][0], hidden[row][..., : len(one), :], atol=1e-5)


def test_the_mean_is_where_learned_weights_of_layers_start(root: Path) -> None:
    mean, every = (of_family(root, "qwen3", layers=layers) for layers in ("mean", "all"))
    ids = mean.tokenize(PROMPTS)
    assert torch.allclose(LayerWeights(DEPTH)(every.encode(ids)[0]), mean.encode(ids)[0], atol=1e-5)


def test_a_layer_that_is_not_there_is_refused(root: Path) -> None:
    for layers in (DEPTH + 1, -DEPTH - 2):
        with pytest.raises(
            ValueError,
            match=rf"layers is {layers}, .*llama has 3: choose a number from 0 \(the embeddings\) to 3, or from -1",
        ):
            of_family(root, "llama", layers=layers)
    assert of_family(root, "llama", layers=-2).identity()["layers"] == -2


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "clip"])
@pytest.mark.parametrize("layers", ["last", "all"])
def test_queries_behind_unequal_prompts_are_answered_as_if_alone(root: Path, family: str, layers: Any) -> None:
    language_model = of_family(root, family, layers=layers)
    ids = language_model.tokenize(PROMPTS)
    hidden, mask = language_model.encode(ids, appended=QUERIES)
    assert hidden.shape == (3, *([DEPTH] if layers == "all" else []), 3, WIDTH)
    assert mask.shape == (3, 3) and bool(mask.all())
    for row, one in enumerate(ids):
        assert torch.allclose(language_model.encode([one], appended=QUERIES)[0][0], hidden[row], atol=1e-5)
    # They are told of the prompt, of each other, and of their own order.
    turned = language_model.encode(ids, appended=QUERIES.flip(0))[0]
    assert not torch.allclose(hidden[0], hidden[1], atol=1e-2)
    assert not torch.allclose(hidden, turned.flip(-2), atol=1e-2)


def test_fixed_padding_changes_nothing_for_queries(root: Path) -> None:
    fixed, longest = (of_family(root, "t5", padding=padding) for padding in ("fixed", "longest"))
    ids = fixed.tokenize(PROMPTS)
    assert torch.equal(fixed.encode(ids, appended=QUERIES)[0], longest.encode(ids, appended=QUERIES)[0])


def test_queries_that_cannot_be_read_are_refused_in_one_line(root: Path) -> None:
    with pytest.raises(
        ValueError, match=r"clip \(CLIPTextModel\) reads token ids alone: learned queries need another model"
    ):
        of_family(root, "clip").encode([np.array([3, 1])], appended=QUERIES)
    bert = of_family(root, "bert")
    bert.check_appended(8)
    with pytest.raises(
        ValueError, match=r"reads at most 32 tokens, asked for 33: lower .*max_length, or the 9 queries"
    ):
        bert.check_appended(9)
    with pytest.raises(
        ValueError, match=r"reads at most 77 tokens, asked for 78: set language_model.max_length to that"
    ):
        of_family(root, "clip", max_length=78)
    narrow = of_family(root, "bert")
    narrow.module.set_input_embeddings(torch.nn.Embedding(60, 8))
    with pytest.raises(ValueError, match=r"embeddings of width 8, hidden states of 16: take another model"):
        narrow.check_appended(1)
    seen = LanguageModelConfig(model="m", pads="seen")
    with pytest.raises(ValueError, match=r"set language_model.pads to 'hidden'"):
        check_connector(QueriesConfig(in_width=WIDTH), seen)


def test_the_connector_must_fit_layers_and_queries(root: Path) -> None:
    denoiser: Any = SimpleNamespace(width=WIDTH, pooled_width=None)
    every = of_family(root, "llama", layers="all")
    check_widths(TSCConfig(in_width=WIDTH, width=WIDTH, layers=DEPTH), every, denoiser)
    with pytest.raises(ValueError, match=r"connector.layers is 4, the models here want 3: set it to 3"):
        check_widths(TSCConfig(in_width=WIDTH, width=WIDTH, layers=4), every, denoiser)
    with pytest.raises(ValueError, match=r"asked for 280: lower"):
        check_widths(QueriesConfig(in_width=WIDTH, width=WIDTH, queries=256), of_family(root, "llama"), denoiser)


@pytest.mark.parametrize("family", ["t5", "bert", "llama", "gemma2"])
def test_only_queries_and_lora_are_given_gradients(root: Path, family: str) -> None:
    language_model = of_family(root, family)
    ids = language_model.tokenize(PROMPTS)
    appended = QUERIES.clone().requires_grad_()
    language_model.encode(ids, appended=appended)[0].square().sum().backward()
    assert appended.grad is not None and bool(appended.grad.any(1).all())
    assert all(p.grad is None and not p.requires_grad for p in language_model.module.parameters())
    with torch.no_grad():
        assert not language_model.encode(ids, appended=appended)[0].requires_grad
    # A parameter inside stands for a LoRA: told of it, the model keeps what its gradient needs.
    name, weight = next((n, p) for n, p in language_model.module.named_parameters() if p.ndim == 2 and "embed" not in n)
    weight.requires_grad_()
    assert not language_model.encode(ids)[0].requires_grad
    language_model.lora[name] = weight
    language_model.encode(ids)[0].square().sum().backward()
    assert [n for n, p in language_model.module.named_parameters() if p.grad is not None] == [name]


@pytest.mark.parametrize("layers", ["last", "all"])
def test_one_overflow_leaves_the_others_their_gradient(root: Path, layers: Any) -> None:
    broken = of_family(root, "llama", layers=layers)
    with torch.no_grad():
        broken.module.get_input_embeddings().weight[5] = torch.inf
    fine, overflows = np.array([8, 9]), np.array([7, 5, 11])
    alone, among = QUERIES.clone().requires_grad_(), QUERIES.clone().requires_grad_()
    broken.encode([fine], appended=alone)[0].square().sum().backward()
    hidden, mask, finite = broken.encode_where_finite([overflows, fine], appended=among)
    hidden.square().sum().backward()
    assert finite.tolist() == [False, True] and not hidden[0].any() and mask.shape == (2, 3)
    assert torch.allclose(alone.grad, among.grad, atol=1e-4)
    with pytest.raises(ValueError, match=r"sample a: .* not finite"):
        broken.encode([overflows, fine], ["a", "b"], appended=among)
    among.grad = None
    hidden, _, finite = broken.encode_where_finite([overflows, overflows], appended=among)
    assert not finite.any() and not hidden.any()
    hidden.square().sum().backward()
    assert among.grad is not None and not among.grad.any()  # and is a number


def test_weights_are_lent_to_a_device_and_come_back(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    language_model = of_family(root, "t5")
    moves: list[tuple[str, bool]] = []
    monkeypatch.setattr(
        language_model.module, "to", lambda device: moves.append((str(device), torch.is_inference_mode_enabled()))
    )
    with torch.inference_mode(), pytest.raises(KeyError), language_model.on("cuda") as lent:
        assert lent is language_model
        raise KeyError
    # Never in inference mode: a weight that was moved in it could not be trained through afterwards.
    assert moves == [("cuda", False), ("cpu", False)]


def test_quantized_weights_stay_where_they_are(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = of_family(root, "llama").config
    with pytest.raises(ValueError, match=r"language_model.quantize='8bit' needs"):
        replace(config, quantize="8bit").load()
    told: list[Any] = []
    monkeypatch.setattr("training.language_models.quantization_of", lambda *asked: (told.append(asked), None)[1])
    quantized = replace(config, dtype="bfloat16", quantize="8bit").load()
    assert told == [("8bit", "bfloat16", "language_model.quantize")]
    monkeypatch.setattr(quantized.module, "to", lambda device: pytest.fail("moved"))
    with quantized.on("meta"):
        assert quantized.to("meta") is quantized and quantized.device.type == "cpu"
    assert quantized.identity()["quantize"] == "8bit"
