"""Norms of gradients by part, and of what the timestep does to a TSC."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.training_fixtures import WIDTH, tsc_config
from training.bridge import Bridge
from training.connectors import MLPConfig, TSCConfig
from training.norms import FRACTIONS, gradient_norms, modulation_norms

TIMES = torch.arange(1000)


def bridge_of(config: TSCConfig | MLPConfig, **lora: dict[str, nn.Module]) -> Bridge:
    torch.manual_seed(0)
    return Bridge(config, **lora)


def test_gradients_by_part_make_up_the_whole() -> None:
    bridge = bridge_of(replace(tsc_config(), layers=3, pooled_width=8), denoiser_lora={"a.lora_A": nn.Linear(4, 2)})
    for parameter in bridge.parameters():
        parameter.grad = torch.randn_like(parameter)
    found = gradient_norms(bridge)
    assert set(found) == {"connector", "layers", "pool", "denoiser_lora"}
    assert found["layers"] == bridge.layers.weights.grad.norm()
    whole = nn.utils.get_total_norm([p.grad for p in bridge.parameters() if p.grad is not None])
    assert torch.stack(list(found.values())).norm() == pytest.approx(float(whole), rel=1e-5)


def test_one_part_is_not_told_twice() -> None:
    bridge = bridge_of(tsc_config())
    for parameter in bridge.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert gradient_norms(bridge) == {}


@pytest.mark.parametrize("gated", [False, True])
def test_modulation_is_nothing_at_first_and_then_its_root_mean_square(gated: bool) -> None:
    bridge = bridge_of(replace(tsc_config(), timestep="adaln_zero" if gated else "adaln"))
    names = {"adaln_shift", "adaln_scale"} | ({"adaln_gate"} if gated else set())
    assert modulation_norms(bridge, TIMES) == {name: [0.0, 0.0] for name in names}
    block = bridge.connector.connector.perceiver_blocks[1]
    with torch.no_grad():  # constant over times and channels
        block.ln_1.linear.bias[:WIDTH] = 3.0
        block.ln_2.linear.bias[:WIDTH] = -3.0
        block.ln_ff.linear.bias[:WIDTH] = 3.0
        block.ln_ff.linear.bias[WIDTH : 2 * WIDTH] = 6.0
    found = modulation_norms(bridge, TIMES)
    assert found["adaln_shift"] == pytest.approx([0.0, 3.0]) and found["adaln_scale"] == pytest.approx([0.0, 12.0**0.5])
    if gated:
        assert found["adaln_gate"] == [0.0, 0.0]


def test_modulation_is_looked_at_over_all_times() -> None:
    bridge = bridge_of(tsc_config())
    nn.init.normal_(bridge.connector.connector.perceiver_blocks[0].ln_1.linear.weight)
    alone = [modulation_norms(bridge, TIMES[int(f * 1000)].expand(1000))["adaln_scale"][0] for f in FRACTIONS]
    assert len(set(alone)) == len(FRACTIONS)
    whole = modulation_norms(bridge, TIMES)["adaln_scale"][0]
    assert whole == pytest.approx((sum(one**2 for one in alone) / len(alone)) ** 0.5, rel=1e-5)


def test_connectors_without_a_timestep_have_none() -> None:
    assert modulation_norms(bridge_of(replace(tsc_config(), timestep="off")), TIMES) == {}
    assert modulation_norms(bridge_of(MLPConfig(in_width=WIDTH, width=WIDTH)), TIMES) == {}
