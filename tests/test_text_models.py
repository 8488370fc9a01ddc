"""Language models as build and training run them: every family, its encoder alone, cast whole, tokens at their own places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pipeline.text_models import (
    Layers,
    depth_of,
    hidden_states,
    hidden_states_behind,
    load_text_model,
    positions_of,
    width_of,
)
from tests.tiny_language_models import DEPTH, FAMILIES, KINDS, WIDTH, make_language_model

IDS = [np.array([7, 9, 12, 8, 6, 11], np.uint16), np.array([9, 7], np.uint16), np.array([8, 11, 10], np.uint16)]
APPENDING = [family for family in FAMILIES if family != "clip"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        make_language_model(root / family, family)
    return root


def load(root: Path, family: str, dtype: str = "float32") -> Any:
    return load_text_model(str(root / family), None, "", dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_frozen_and_cast_whole(root: Path, family: str) -> None:
    module = load(root, family, "float16")
    assert {p.dtype for p in module.parameters()} == {torch.float16}
    assert not module.training and not any(p.requires_grad for p in module.parameters())
    assert (width_of(module), depth_of(module)) == (WIDTH, DEPTH)
    assert positions_of(module) == {"clip": 77, "bert": 32, "t5": None}.get(family, 64)
    # No decoder, no head, nothing that is not of the text's layers.
    assert not any("decoder" in name or "head" in name for name, _ in module.named_parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_those_that_were_saved(root: Path, family: str) -> None:
    from safetensors.torch import load_file

    saved = load_file(root / family / "model.safetensors")
    for name, tensor in load(root, family).named_parameters():
        if "pooler" not in name:
            found = [
                other for key, other in saved.items() if key.endswith(name) and "decoder" not in key.split(name)[0]
            ]
            assert any(torch.equal(tensor, other) for other in found), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_is_the_same_as_one_by_one(root: Path, family: str) -> None:
    module = load(root, family)
    hidden, mask = hidden_states(module, IDS, length=12, pad=0, pads="hidden")
    assert mask.sum(1).tolist() == [len(one) for one in IDS]
    for row, one in enumerate(IDS):
        alone = module(input_ids=torch.from_numpy(one[None].astype(np.int64))).last_hidden_state[0]
        assert torch.allclose(hidden[row, : len(one)], alone, atol=1e-5)
        # ... and order matters, so that places are told at all.
        turned, _ = hidden_states(module, [one[::-1].copy()], length=len(one), pad=0, pads="hidden")
        assert not torch.allclose(turned[0].flip(0), alone, atol=1e-2)


def test_seen_pads_change_what_a_text_becomes(root: Path) -> None:
    module = load(root, "t5")
    hidden, _ = hidden_states(module, IDS, length=8, pad=0, pads="hidden")
    seen, mask = hidden_states(module, IDS, length=8, pad=0, pads="seen")
    assert bool(mask.all()) and not torch.allclose(seen[1, :2], hidden[1, :2], atol=1e-3)


@pytest.mark.parametrize("family", KINDS["decoder"])
def test_half_precision_keeps_places_exact(root: Path, family: str) -> None:
    from transformers import AutoModel

    module = load(root, family, "bfloat16")
    exact = load(root, family)
    for (name, half), (_, whole) in zip(module.named_buffers(), exact.named_buffers(), strict=True):
        if "inv_freq" in name:
            assert half.dtype == torch.float32 and torch.equal(half, whole)
    reference = AutoModel.from_pretrained(root / family, dtype=torch.bfloat16).eval()
    ids = torch.from_numpy(IDS[0][None].astype(np.int64))
    assert torch.equal(module(input_ids=ids).last_hidden_state, reference(input_ids=ids).last_hidden_state)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers(root: Path, family: str) -> None:
    module = load(root, family)

    def read(layers: Layers) -> torch.Tensor:
        return hidden_states(module, IDS, length=7, pad=0, pads="hidden", layers=layers)[0]

    every = read("all")
    assert every.shape == (3, DEPTH, 7, WIDTH)
    assert torch.equal(every[:, -1], read("last")) and torch.equal(read(-1), read(DEPTH))
    assert (
        torch.equal(read(-1), read("last"))
        and torch.equal(read(-2), every[:, -2])
        and torch.equal(read(1), every[:, 0])
    )
    assert torch.allclose(read("mean"), F.layer_norm(every, (WIDTH,)).mean(1), atol=1e-6)
    # The embeddings know nothing of what stands before them; the first layer does.
    assert read(0).shape == (3, 7, WIDTH) and not torch.equal(read(0), read(1))


def test_the_mean_of_half_precision_is_taken_in_float32(root: Path) -> None:
    module = load(root, "llama", "float16")
    mean, _ = hidden_states(module, IDS, length=7, pad=0, pads="hidden", layers="mean")
    every, _ = hidden_states(module, IDS, length=7, pad=0, pads="hidden", layers="all")
    assert mean.dtype == torch.float16
    assert torch.equal(mean, F.layer_norm(every.float(), (WIDTH,)).sum(1).div(DEPTH).half())


@pytest.mark.parametrize("family", APPENDING)
def test_what_stands_behind_a_prompt_is_as_if_it_stood_there_alone(root: Path, family: str) -> None:
    module = load(root, family)
    table = module.get_input_embeddings()
    as_words = torch.tensor([10, 6, 12])
    for layers in ("last", "all"):
        found = hidden_states_behind(module, IDS, table.weight[as_words], pad=0, layers=layers)  # type: ignore[arg-type]
        for row, one in enumerate(IDS):
            # Rows of the model's own table, so that the same is got from ids without any pad.
            whole = [np.concatenate([one, as_words.numpy()])]
            alone, _ = hidden_states(module, whole, length=len(whole[0]), pad=0, pads="hidden", layers=layers)  # type: ignore[arg-type]
            assert torch.allclose(found[row], alone[0][..., len(one) :, :], atol=1e-5)


@pytest.mark.parametrize("family", APPENDING)
def test_gradients_of_a_batch_are_those_of_each_prompt_and_no_weight_has_one(root: Path, family: str) -> None:
    module = load(root, family)
    draw = torch.Generator().manual_seed(0)
    appended, projection = torch.randn(2, WIDTH, generator=draw), torch.randn(WIDTH, generator=draw)

    def gradient(ids: list[np.ndarray]) -> torch.Tensor:
        embeddings = appended.clone().requires_grad_()
        (hidden_states_behind(module, ids, embeddings, pad=0) @ projection).square().sum().backward()
        assert embeddings.grad is not None
        return embeddings.grad

    together = gradient(IDS)
    assert bool(together.any(1).all()) and all(p.grad is None for p in module.parameters())
    assert torch.allclose(
        together, sum(gradient([one]) for one in IDS), rtol=1e-3, atol=1e-3 * float(together.abs().max())
    )


def test_nothing_else_has_a_gradient(root: Path) -> None:
    module = load(root, "llama")
    trained = module.layers[0].self_attn.q_proj.weight.requires_grad_()
    assert not hidden_states(module, IDS, length=7, pad=0, pads="hidden")[0].requires_grad
    hidden_states(module, IDS, length=7, pad=0, pads="hidden", gradient=True)[0].sum().backward()
    assert bool(trained.grad.any()) and sum(p.grad is not None for p in module.parameters()) == 1


def test_a_model_with_another_decoder_is_refused(tmp_path: Path) -> None:
    from transformers import BartConfig

    BartConfig(vocab_size=8, d_model=8, encoder_layers=1, decoder_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a bart with a decoder: save its encoder alone and name that folder"):
        load_text_model(str(tmp_path), None, "", "float32")


def test_weights_that_are_not_there_are_not_made_up(root: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(root / "llama" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    (tmp_path / "config.json").write_text((root / "llama" / "config.json").read_text())
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"no weights for 1 parameters of LlamaModel, the first is layers\.1\.mlp\.up_proj"
    ):
        load_text_model(str(tmp_path), None, "", "float32")


def test_pickled_weights_and_code_in_the_folder_are_refused(root: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    config = (root / "llama" / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    torch.save(load_file(root / "llama" / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_text_model(str(tmp_path), None, "", "float32")
    unknown = config.replace('"model_type": "llama"', '"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine"}')
    (tmp_path / "config.json").write_text(unknown)
    (tmp_path / "code.py").write_text("raise SystemExit('this was run')")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_text_model(str(tmp_path), None, "", "float32")


def test_quantized_weights_are_asked_for_on_the_gpu(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    told: dict[str, Any] = {}

    def from_pretrained(model: str, **settings: Any) -> tuple[Any, dict[str, Any]]:
        told.update(settings)
        return transformers.LlamaModel(transformers.LlamaConfig.from_pretrained(model)), {"missing_keys": set()}

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", from_pretrained)
    module = load_text_model(str(root / "llama"), "abc", "", "bfloat16", "four bits")
    assert told["quantization_config"] == "four bits"
    assert told["device_map"] == {"": 3} and told["revision"] == "abc" and told["dtype"] == torch.bfloat16
    assert told["use_safetensors"] is True and told["trust_remote_code"] is False
    # What bitsandbytes holds is not cast.
    assert {p.dtype for p in module.parameters()} == {torch.float32} and not any(
        p.requires_grad for p in module.parameters()
    )


def test_roberta_counts_places_from_behind_the_pads() -> None:
    from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

    sizes = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 9,
    }
    for kind, config, most in ((RobertaModel, RobertaConfig, 8), (BertModel, BertConfig, 10)):
        module = kind(config(max_position_embeddings=10, pad_token_id=1, **sizes))
        assert positions_of(module) == most
        module(input_ids=torch.full((1, most), 5))
        with pytest.raises((RuntimeError, IndexError)):
            module(input_ids=torch.full((1, most + 1), 5))
