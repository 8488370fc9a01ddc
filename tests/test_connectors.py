"""The connectors: the TSC has the layout of ELLA's released weights and does what the paper says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pipeline.fingerprint import plain
from tests.training_fixtures import tsc_config
from training.checkpoints import load_weights, save_weights
from training.connectors import ConnectorConfig, LaViConfig, MLPConfig, TSCConfig, build_connector, connector_config
from training.connectors.tsc import sinusoid

BLOCK = {
    "attn.in_proj_weight": [2304, 768], "attn.in_proj_bias": [2304],
    "attn.out_proj.weight": [768, 768], "attn.out_proj.bias": [768],
    "mlp.c_fc.weight": [3072, 768], "mlp.c_fc.bias": [3072], "mlp.c_proj.weight": [768, 3072], "mlp.c_proj.bias": [768],
    "ln_1.linear.weight": [1536, 768], "ln_1.linear.bias": [1536],
    "ln_2.linear.weight": [1536, 768], "ln_2.linear.bias": [1536],
    "ln_ff.linear.weight": [1536, 768], "ln_ff.linear.bias": [1536],
}  # fmt: skip
RELEASED = {
    "time_embedding.linear_1.weight": [768, 320], "time_embedding.linear_1.bias": [768],
    "time_embedding.linear_2.weight": [768, 768], "time_embedding.linear_2.bias": [768],
    "connector.latents": [64, 768],
    "connector.time_aware_linear.weight": [768, 768], "connector.time_aware_linear.bias": [768],
    "connector.proj_in.weight": [768, 2048], "connector.proj_in.bias": [768],
} | {f"connector.perceiver_blocks.{n}.{name}": shape for n in range(6) for name, shape in BLOCK.items()}  # fmt: skip


def inputs(length: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, length, 16, generator=generator)
    mask = torch.arange(length)[None] < torch.tensor([[length], [3]])
    return hidden, mask, torch.tensor([10, 900])


def through(module: nn.Module, *given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Both steps of a connector."""
    hidden, mask, times = given
    return module.at(module.read(hidden, mask), mask, times)


def woken(module: nn.Module) -> nn.Module:
    """With the zero-initialised layers away from zero, so that every path counts."""
    torch.manual_seed(1)
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return module.eval()


def test_tsc_has_the_released_layout() -> None:
    with torch.device("meta"):
        state = build_connector(TSCConfig()).state_dict()
    assert len(RELEASED) == 93
    assert {name: list(tensor.shape) for name, tensor in state.items()} == RELEASED
    assert sum(tensor.numel() for tensor in state.values()) == 66_820_608


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (TSCConfig(in_width=4096), 68_393_472),
        (TSCConfig(width=2048, time_width=2048), 466_546_688),
        (TSCConfig(timestep="adaln_zero"), 73_907_712),
        (TSCConfig(timestep="off"), 44_159_232),
        (TSCConfig(timestep="off", blocks=1), 8_712_192),
        (MLPConfig(), 2_164_224),
        (LaViConfig(in_width=1024, width=768), 21_254_528),
        (LaViConfig(in_width=4096, width=768), 228_920_192),
        (LaViConfig(in_width=1024, width=4096), 113_288_704),
    ],
)
def test_parameter_counts(config: ConnectorConfig, parameters: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in build_connector(config).parameters()) == parameters


def test_sinusoid_is_that_of_diffusers() -> None:
    from diffusers.models.embeddings import Timesteps

    times = torch.tensor([0, 1, 500, 999])
    expected = Timesteps(320, flip_sin_to_cos=True, downscale_freq_shift=0)(times)
    assert torch.equal(sinusoid(times, 320), expected)


def test_tsc_is_what_the_paper_describes() -> None:
    """Against the formulas, written out for one head with diffusers' time embedding and plain softmax."""
    config = TSCConfig(in_width=16, width=8, blocks=1, heads=1, queries=3, time_channels=4, time_width=8)
    tsc = woken(build_connector(config))
    hidden, mask, times = inputs()
    state, silu = tsc.state_dict(), torch.nn.functional.silu

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    time = linear(silu(linear(sinusoid(times, 4), "time_embedding.linear_1")), "time_embedding.linear_2")

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        shift, scale = linear(silu(time), f"connector.perceiver_blocks.0.{name}.linear")[:, None].chunk(2, -1)
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift

    block = "connector.perceiver_blocks.0."
    latents = state["connector.latents"][None] + linear(silu(time), "connector.time_aware_linear")[:, None]
    own = norm(latents, "ln_1")
    keys = torch.cat([own, norm(linear(hidden, "connector.proj_in"), "ln_2")], 1)
    parts = zip(state[block + "attn.in_proj_weight"].chunk(3), state[block + "attn.in_proj_bias"].chunk(3), strict=True)
    q, k, v = (x @ w.T + b for x, (w, b) in zip((own, keys, keys), parts, strict=True))
    latents = latents + linear((q @ k.transpose(1, 2) / 8**0.5).softmax(-1) @ v, block + "attn.out_proj")
    inner = linear(norm(latents, "ln_ff"), block + "mlp.c_fc").clamp(min=0).square()
    expected = latents + linear(inner, block + "mlp.c_proj")
    assert torch.allclose(through(tsc, hidden, mask, times)[0], expected, atol=1e-4)


def test_time_enters_even_at_the_start_and_per_sample() -> None:
    tsc = build_connector(tsc_config()).eval()
    hidden, mask, _ = inputs()
    low, high, mixed = (through(tsc, hidden, mask, torch.tensor(t))[0] for t in ([10, 10], [900, 900], [10, 900]))
    assert (low - high).abs().amax() > 1e-3
    assert torch.allclose(mixed[0], low[0], atol=1e-6) and torch.allclose(mixed[1], high[1], atol=1e-6)


@pytest.mark.parametrize(("use_mask", "seen"), [("all", True), ("mask", False)])
def test_pads_are_seen_only_where_they_may_be(use_mask: str, seen: bool) -> None:
    settings = plain(tsc_config()) | {"use_mask": use_mask}
    tsc = woken(build_connector(connector_config(settings)))
    hidden, mask, times = inputs()
    changed = torch.where(mask[..., None], hidden, hidden + 1)
    tokens, other = through(tsc, hidden, mask, times)[0], through(tsc, changed, mask, times)[0]
    assert torch.allclose(tokens[0], other[0], atol=1e-6)
    assert (not torch.allclose(tokens[1], other[1], atol=1e-3)) is seen


def test_mlp_keeps_tokens_and_mask() -> None:
    hidden, mask, times = inputs()
    tokens, out = through(build_connector(MLPConfig(in_width=16, width=8)), hidden, mask, times)
    assert tokens.shape == (2, 6, 8) and torch.equal(out, mask)
    assert through(build_connector(MLPConfig(in_width=16, width=8, use_mask="all")), hidden, mask, times)[1] is None


def test_weights_go_through_a_half_precision_file(tmp_path: Path) -> None:
    """As ELLA's own file is: fp16 on disk, float32 here."""
    one, two = build_connector(tsc_config()), build_connector(tsc_config())
    path = tmp_path / "tsc.safetensors"
    save_weights({name: tensor.half() for name, tensor in one.state_dict().items()}, path)
    load_weights(two, load_file(path), path)
    for name, tensor in two.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.allclose(tensor, one.state_dict()[name], atol=1e-3)
    with pytest.raises(ValueError, match=r"connector.latents is not known: is it another connector"):
        load_weights(build_connector(MLPConfig()), load_file(path), path)
    wider = connector_config(plain(tsc_config()) | {"queries": 5})
    with pytest.raises(ValueError, match=r"connector.latents has shape \[4, 16\], the connector \[5, 16\]"):
        load_weights(build_connector(wider), load_file(path), path)


@pytest.mark.parametrize("config", [tsc_config(), MLPConfig(in_width=7)])
def test_a_configuration_comes_back_from_json(config: ConnectorConfig) -> None:
    assert connector_config(plain(config)) == config


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tsc.width 768 is not a multiple of tsc.heads 7"):
        TSCConfig(heads=7)
    with pytest.raises(ValueError, match=r"there is no connector 'resampler': there are: lavi, mlp, queries, tsc"):
        connector_config({"kind": "resampler"})
    with pytest.raises(ValueError, match=r"has no setting 'gates'"):
        connector_config({"kind": "tsc", "gates": 1})
