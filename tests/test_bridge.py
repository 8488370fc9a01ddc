"""The bridge: layers weighed, text pooled, two texts joined, and its parts taken apart and put together again."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pipeline.fingerprint import plain
from tests.training_fixtures import tsc_config
from training.bridge import AttentionPool, Bridge, Conditioning, LayerWeights, from_parts, joined, parts_of
from training.connectors import MLPConfig, QueriesConfig, connector_config


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_layers_weigh_the_same_at_first_and_as_they_learn() -> None:
    layers, hidden = LayerWeights(3), random(2, 3, 5, 8) * torch.tensor([1.0, 40.0, 0.1])[:, None, None] + 3
    normalised = torch.stack([F.layer_norm(one, (8,)) for one in hidden.unbind(1)])
    assert torch.allclose(layers(hidden), normalised.mean(0), atol=1e-6)  # each counts alike, however large it is
    layers.weights.data = torch.tensor([0.0, math.log(3), -100.0])
    assert torch.allclose(layers(hidden), normalised[0] / 4 + 3 * normalised[1] / 4, atol=1e-6)
    assert layers(hidden.half()).dtype == torch.float32
    with pytest.raises(ValueError, match=r"the language model gives 4 layers, connector.layers is 3: make them equal"):
        layers(random(2, 4, 5, 8))


@torch.no_grad()
def test_pooling_is_attention_of_the_tokens_mean() -> None:
    """Against the formulas, one head: softmax(q k / sqrt(d)) v, asked by the mean of the tokens that may be seen."""
    pool, tokens = AttentionPool(8, 5, heads=1), random(2, 4, 8)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    rows = []
    for row, seen in zip(tokens, mask, strict=True):
        kept = row[seen]
        asked = torch.cat([kept.mean(0, keepdim=True), kept])
        q, k, v = (
            x @ proj.weight.T + proj.bias
            for x, proj in ((asked[:1], pool.q_proj), (asked, pool.k_proj), (asked, pool.v_proj))
        )
        rows.append(pool.c_proj((q @ k.T / math.sqrt(8)).softmax(-1) @ v)[0])
    assert torch.allclose(pool(tokens, mask), torch.stack(rows), atol=1e-6)
    assert torch.allclose(pool(tokens, None)[0], rows[0], atol=1e-6)
    assert not torch.allclose(pool(tokens, None)[1], rows[1], atol=1e-3)


def test_the_other_texts_tokens_stand_behind_ours() -> None:
    ours, theirs = random(2, 3, 8), random(2, 4, 8, seed=1)
    mask, other = torch.tensor([[True] * 3, [True, False, False]]), torch.tensor([[True] * 4, [True] * 3 + [False]])
    every = [torch.ones_like(one) for one in (mask, other)]
    pooled = random(2, 5)
    for first, second, seen in (
        (None, None, None),
        (mask, None, torch.cat([mask, every[1]], 1)),
        (None, other, torch.cat([every[0], other], 1)),
        (mask, other, torch.cat([mask, other], 1)),
    ):
        found = joined(Conditioning(ours, first, pooled), Conditioning(theirs.half(), second, random(2, 5, seed=2)))
        assert torch.equal(found.tokens[:, :3], ours) and torch.equal(found.tokens[:, 3:], theirs.half().float())
        assert found.pooled is pooled
        assert found.mask is seen if seen is None else torch.equal(found.mask, seen)


def bridge_of(**changes: object) -> Bridge:
    torch.manual_seed(0)
    return Bridge(connector_config(plain(tsc_config()) | changes))


def test_a_bridge_reads_once_and_answers_at_every_step() -> None:
    bridge = bridge_of(layers=3, pooled_width=6).eval()
    hidden, mask, times = random(2, 3, 5, 16), torch.ones(2, 5, dtype=torch.bool), torch.tensor([10.0, 900.0])
    beside = Conditioning(random(2, 7, 16), None)
    text = bridge.read(hidden, mask)
    bare, both = bridge.at(text, mask, times), bridge(hidden, mask, times, beside)
    tokens, seen = bridge.connector.at(text, mask, times)
    assert torch.equal(text, bridge.connector.read(bridge.layers(hidden), mask))
    assert torch.equal(bare.tokens, tokens) and bare.mask is seen is None
    assert torch.equal(both.tokens, torch.cat([tokens, beside.tokens], 1))
    # The pooled vector is of the connector's tokens, which know the timestep, and of no others.
    assert bare.pooled.shape == (2, 6) and torch.equal(bare.pooled, both.pooled)
    assert torch.equal(bare.pooled, bridge.pool(tokens, None))
    assert not torch.equal(bare.pooled, bridge.at(text, mask, times + 50).pooled)


def test_a_bridge_has_what_its_settings_ask_for() -> None:
    assert {name for name, _ in bridge_of().named_children()} == {"connector"}
    assert {name for name, _ in bridge_of(layers=2, pooled_width=8).named_children()} == {"connector", "layers", "pool"}
    assert bridge_of().appended is None
    queries = Bridge(QueriesConfig(in_width=8, width=6, queries=3, heads=2, blocks=1))
    assert queries.appended is queries.connector.appended
    assert "connector.appended" in queries.state_dict()


def lora(*paths: str) -> dict[str, nn.Module]:
    """What `add_lora` gives."""
    layers: dict[str, nn.Module] = {}
    for path in paths:
        layers |= {f"{path}.lora_A": nn.Linear(4, 2, bias=False), f"{path}.lora_B": nn.Linear(2, 4, bias=False)}
        layers[f"{path}.lora_dropout"] = nn.Dropout(0.1)
    return layers


def test_parts_have_the_names_of_others_and_come_back() -> None:
    """The connector ELLA's, the LoRA peft's."""
    of_language_model, of_denoiser = (
        lora("layers.0.self_attn.q_proj"),
        lora("down.0.attn1.to_q", "down.0.attn1.to_out.0"),
    )
    bridge = Bridge(
        connector_config(plain(tsc_config()) | {"layers": 2, "pooled_width": 8}),
        language_model_lora=of_language_model, denoiser_lora=of_denoiser,
    )  # fmt: skip
    state = bridge.state_dict()
    parts = parts_of(state)
    assert set(parts) == {"connector", "layers", "pool", "language_model_lora", "denoiser_lora"}
    assert parts["connector"].keys() == bridge.connector.state_dict().keys() >= {"connector.latents"}
    assert set(parts["language_model_lora"]) == {f"layers.0.self_attn.q_proj.lora_{name}.weight" for name in "AB"}
    assert set(parts["denoiser_lora"]) == {
        f"down.0.attn1.{layer}.lora_{name}.weight" for layer in ("to_q", "to_out.0") for name in "AB"
    }
    back = from_parts(parts)
    assert list(back) == list(state) and all(back[name] is state[name] for name in state)
    bridge.load_state_dict(back)


def test_lora_are_the_models_own_and_follow_the_bridge() -> None:
    layers = lora("a.b")
    bridge = Bridge(MLPConfig(in_width=4, width=4), denoiser_lora=layers)
    owned = {id(parameter) for parameter in bridge.parameters()}
    assert all(id(parameter) in owned for layer in layers.values() for parameter in layer.parameters())
    bridge.eval()
    assert not layers["a.b.lora_dropout"].training
    bridge.train()
    assert layers["a.b.lora_dropout"].training
    assert not hasattr(bridge, "language_model_lora")
