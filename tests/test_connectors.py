"""The connectors: the TSC has the layout of ELLA's released weights, and all do what the papers say, to float64's last digits."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from pipeline.fingerprint import plain
from tests.training_fixtures import tsc_config
from training.connectors import (
    ConnectorConfig,
    LaViConfig,
    MLPConfig,
    QueriesConfig,
    TSCConfig,
    build_connector,
    connector_config,
)
from training.connectors.tsc import sinusoid
from training.whole_files import load_weights, save_weights

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


class Formulas:
    """The connectors once more in numpy, from the papers' equations: weights by name, a row of tokens at a time."""

    def __init__(self, module: nn.Module) -> None:
        self.weights = {name: tensor.numpy().astype(np.float64) for name, tensor in module.state_dict().items()}

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return np.einsum("...i,oi->...o", x, self.weights[f"{name}.weight"]) + self.weights[f"{name}.bias"]

    def norm(self, x: np.ndarray, name: str, eps: float = 1e-5) -> np.ndarray:
        """With learned scale and shift."""
        return centred(x, eps) * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def attention(self, asking: np.ndarray, asked: np.ndarray, name: str, heads: int, seen: np.ndarray) -> np.ndarray:
        """softmax(Q K / sqrt(d)) V of each head (Vaswani et al. 2017, equation 1); (Q, W), (K, W), bool (K,) -> (Q, W)."""
        weights, biases = self.weights[f"{name}.in_proj_weight"], self.weights[f"{name}.in_proj_bias"]
        width = len(weights) // 3
        size, answers = width // heads, []
        for head in range(heads):
            q, k, v = (
                x @ weights[start : start + size].T + biases[start : start + size]
                for x, start in ((asking, head * size), (asked, width + head * size), (asked, 2 * width + head * size))
            )
            logits = np.where(seen, q @ k.T / math.sqrt(size), -np.inf)
            powers = np.exp(logits - logits.max(-1, keepdims=True))
            answers.append(powers / powers.sum(-1, keepdims=True) @ v)
        return self.linear(np.concatenate(answers, -1), f"{name}.out_proj")

    def tsc(self, config: TSCConfig, hidden: np.ndarray, mask: np.ndarray, timestep: float) -> np.ndarray:
        """ELLA's section 3.2 and figure 2; the gates are DiT's (Peebles & Xie 2023, figure 3)."""
        latents, time = self.weights["connector.latents"], np.zeros(0)
        if config.timestep != "off":
            half = config.time_channels // 2
            angles = [timestep * 10_000 ** (-number / half) for number in range(half)]
            features = np.array([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
            inner = silu(self.linear(features, "time_embedding.linear_1"))
            time = silu(self.linear(inner, "time_embedding.linear_2"))
            latents = latents + self.linear(time, "connector.time_aware_linear")
        text = self.linear(hidden, "connector.proj_in")
        seen = mask if config.use_mask == "mask" else np.ones_like(mask)
        seen = np.concatenate([np.ones(config.queries, dtype=bool), seen])
        for number in range(config.blocks):
            block = f"connector.perceiver_blocks.{number}"

            def norm(x: np.ndarray, name: str, block: str = block) -> tuple[np.ndarray, np.ndarray | float]:
                if config.timestep == "off":
                    return self.norm(x, f"{block}.{name}", 1e-6), 1.0
                shift, scale, *gate = self.linear(time, f"{block}.{name}.linear").reshape(-1, config.width)
                return centred(x, 1e-6) * (1 + scale) + shift, gate[0] if gate else 1.0

            asking, gate = norm(latents, "ln_1")
            asked = np.concatenate([asking, norm(text, "ln_2")[0]])
            latents = latents + gate * self.attention(asking, asked, f"{block}.attn", config.heads, seen)
            inner, gate = norm(latents, "ln_ff")
            inner = np.maximum(self.linear(inner, f"{block}.mlp.c_fc"), 0) ** 2
            latents = latents + gate * self.linear(inner, f"{block}.mlp.c_proj")
        return latents

    def lavi(self, hidden: np.ndarray) -> np.ndarray:
        """LaVi-Bridge's section 3.3; GEGLU is equation 6 of Shazeer 2020."""
        for number in (1, 2):
            both = self.linear(self.norm(hidden, f"norm_{number}"), f"feed_forward_{number}.gated")
            inner, gate = np.split(both, 2, axis=-1)
            hidden = self.linear(inner * gelu(gate), f"feed_forward_{number}.out")
        return hidden

    def queries(self, config: QueriesConfig, hidden: np.ndarray) -> np.ndarray:
        """Transformer blocks with the norm first (Xiong et al. 2020, arXiv 2002.04745, section 3), then a projection."""
        for number in range(config.blocks):
            block, every = f"blocks.{number}", np.ones(config.queries, dtype=bool)
            inner = self.norm(hidden, f"{block}.norm1")
            hidden = hidden + self.attention(inner, inner, f"{block}.self_attn", config.heads, every)
            inner = gelu(self.linear(self.norm(hidden, f"{block}.norm2"), f"{block}.linear1"))
            hidden = hidden + self.linear(inner, f"{block}.linear2")
        return self.linear(self.norm(hidden, "norm"), "proj")


def centred(x: np.ndarray, eps: float) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def gelu(x: np.ndarray) -> np.ndarray:
    return x * np.vectorize(math.erf)(x / math.sqrt(2)) / 2 + x / 2


def assert_is(found: torch.Tensor, expected: list[np.ndarray]) -> None:
    """To a relative error of 1e-9: float64 throughout."""
    assert found.dtype == torch.float64
    wanted = np.stack(expected)
    assert np.abs(found.numpy() - wanted).max() <= 1e-9 * np.abs(wanted).max()


@torch.no_grad()
@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 4),
    length=st.integers(1, 9),
    heads=st.sampled_from([1, 2, 4]),
    queries=st.sampled_from([1, 3, 64, 256]),
    blocks=st.integers(1, 2),
    timestep=st.sampled_from(["adaln", "adaln_zero", "off"]),
    use_mask=st.sampled_from(["all", "mask"]),
)
def test_tsc_is_what_the_papers_describe(
    seed: int, batch: int, length: int, heads: int, queries: int, blocks: int, timestep: str, use_mask: str
) -> None:
    """At every size, with each sample's own length and timestep."""
    config = TSCConfig(
        in_width=5, width=heads * 4, heads=heads, queries=queries, blocks=blocks, time_channels=6, time_width=7,
        timestep=timestep, use_mask=use_mask,  # type: ignore[arg-type]
    )  # fmt: skip
    tsc = woken(build_connector(config)).double()
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, length, 5, generator=generator, dtype=torch.float64)
    mask = torch.arange(length)[None] < torch.randint(1, length + 1, (batch, 1), generator=generator)
    times = 1000 * torch.rand(batch, generator=generator)  # as they are told: float32, in flows between the integers
    tokens, seen = through(tsc, hidden, mask, times)
    formulas = Formulas(tsc)
    rows = zip(hidden.numpy(), mask.numpy(), times.tolist(), strict=True)
    assert_is(tokens, [formulas.tsc(config, *row) for row in rows])
    assert seen is None


@torch.no_grad()
def test_lavi_is_what_the_paper_describes() -> None:
    hidden, mask, times = inputs()
    for config in (LaViConfig(in_width=16, width=6), LaViConfig(in_width=16, width=6, hidden_width=3, use_mask="mask")):
        lavi = woken(build_connector(config)).double()
        tokens, seen = through(lavi, hidden.double(), mask, times)
        assert_is(tokens, [Formulas(lavi).lavi(row) for row in hidden.double().numpy()])
        assert seen is (mask if config.use_mask == "mask" else None)
    assert lavi.norm_2.weight.shape == (3,)


@torch.no_grad()
def test_queries_are_read_as_described() -> None:
    """By blocks in the language model's width, each query hearing the others; all may be seen whatever the prompt's mask."""
    config = QueriesConfig(in_width=16, width=6, queries=4, blocks=2, heads=2)
    connector = woken(build_connector(config)).double()
    assert connector.appended.shape == (4, 16)
    hidden, mask, times = inputs(4)
    tokens, seen = through(connector, hidden.double(), mask, times)
    assert_is(tokens, [Formulas(connector).queries(config, row) for row in hidden.double().numpy()])
    assert seen is None


@pytest.mark.parametrize("queries", [64, 128, 256])
def test_as_many_tokens_as_queries(queries: int) -> None:
    """64 to 256, as in the literature; each is one more latent of the TSC's width."""
    with torch.device("meta"):
        config = TSCConfig(queries=queries)
        tsc = build_connector(config)
        hidden, mask = torch.empty(2, 7, 2048), torch.ones(2, 7, dtype=torch.bool)
        tokens, _ = through(tsc, hidden, mask, torch.empty(2))
        assert tokens.shape == (2, queries, 768)
        assert sum(p.numel() for p in tsc.parameters()) == 66_820_608 + (queries - 64) * 768
        asked = build_connector(QueriesConfig(queries=queries, heads=32))
        assert asked.appended.shape == (queries, 2048)
        assert through(asked, torch.empty(2, queries, 2048), mask, torch.empty(2))[0].shape == (2, queries, 768)


def test_only_the_tsc_knows_the_timestep() -> None:
    """The switch: off, or another connector, gives the same tokens at every step."""
    hidden, mask, times = inputs()
    for config in (
        TSCConfig(in_width=16, width=8, heads=2, blocks=1, queries=3, timestep="off"),
        MLPConfig(in_width=16, width=8),
        LaViConfig(in_width=16, width=8),
        QueriesConfig(in_width=16, width=8, heads=2, blocks=1, queries=6),
    ):
        module = woken(build_connector(config))
        assert torch.equal(through(module, hidden, mask, times)[0], through(module, hidden, mask, times + 50)[0])
        assert not any("time" in name for name in module.state_dict())
    module = woken(build_connector(tsc_config()))
    assert not torch.allclose(through(module, hidden, mask, times)[0], through(module, hidden, mask, times + 50)[0])


def test_lavis_dropout_is_of_training_alone() -> None:
    hidden, mask, times = inputs()
    lavi = build_connector(LaViConfig(in_width=16, width=8, dropout=0.5))
    one, other = (through(lavi.train(), hidden, mask, times)[0] for _ in range(2))
    assert not torch.equal(one, other)
    one, other = (through(lavi.eval(), hidden, mask, times)[0] for _ in range(2))
    assert torch.equal(one, other)


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


def test_a_timestep_is_exact_in_half_precision() -> None:
    """The sinusoid is of 999, not of the 1000 that bfloat16 would make of it."""
    tsc = woken(build_connector(tsc_config())).bfloat16()
    hidden, mask, _ = inputs()
    one, other = (through(tsc, hidden, mask, torch.tensor([time] * 2))[0] for time in (999.0, 1000.0))
    assert one.dtype == torch.bfloat16 and not torch.equal(one, other)


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


@pytest.mark.parametrize(
    "config", [tsc_config(), MLPConfig(in_width=7), LaViConfig(dropout=0.1, layers=3), QueriesConfig(pooled_width=4)]
)
def test_a_configuration_comes_back_from_json(config: ConnectorConfig) -> None:
    assert connector_config(plain(config)) == config


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tsc.width 768 is not a multiple of tsc.heads 7"):
        TSCConfig(heads=7)
    with pytest.raises(ValueError, match=r"there is no connector 'resampler': there are: lavi, mlp, queries, tsc"):
        connector_config({"kind": "resampler"})
    for wrong, problem in (
        ({"in_width": 2.5}, "in_width is 2.5"), ({"layers": True}, "layers is True"), ({"width": "768"}, "width is '768'"),
        ({"width": 12, "pooled_width": 4}, "width 12 is not a multiple of 8, the heads that pool"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=problem):
            MLPConfig(**wrong)
    with pytest.raises(ValueError, match=r"has no setting 'gates'"):
        connector_config({"kind": "tsc", "gates": 1})
    with pytest.raises(ValueError, match=r"tsc.timestep is 'on': choose 'adaln', 'adaln_zero' or 'off'"):
        TSCConfig(timestep="on")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"lavi.dropout is 1: it must be in \[0, 1\)"):
        LaViConfig(dropout=1)
    with pytest.raises(ValueError, match=r"queries.in_width 2048 is not a multiple of queries.heads 7"):
        QueriesConfig(heads=7)
    with pytest.raises(ValueError, match=r"mlp.layers is 0: it must be a whole number, at least 1"):
        MLPConfig(layers=0)
