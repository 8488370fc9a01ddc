"""ELLA's file has the released layout, holds the same connector, and takes no other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.training_fixtures import tsc_config
from training.bridge import Bridge
from training.configuration import LanguageModelConfig
from training.connectors import MLPConfig, TSCConfig
from training.ella import RELEASED, arguments, check_features, file_name, load_ella, save_ella


def released_layout() -> dict[str, list[int]]:
    """Names and shapes in the file that ELLA's authors released."""
    layout = {
        "time_embedding.linear_1": [768, 320],
        "time_embedding.linear_2": [768, 768],
        "connector.time_aware_linear": [768, 768],
        "connector.proj_in": [768, 2048],
    }
    for block in (f"connector.perceiver_blocks.{number}" for number in range(6)):
        layout |= {f"{block}.attn.out_proj": [768, 768]}
        layout |= {f"{block}.mlp.c_fc": [3072, 768], f"{block}.mlp.c_proj": [768, 3072]}
        layout |= {f"{block}.{norm}.linear": [1536, 768] for norm in ("ln_1", "ln_2", "ln_ff")}
    shapes = {f"{name}.weight": shape for name, shape in layout.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in layout.items()}
    for block in (f"connector.perceiver_blocks.{number}" for number in range(6)):
        shapes |= {f"{block}.attn.in_proj_weight": [2304, 768], f"{block}.attn.in_proj_bias": [2304]}
    return shapes | {"connector.latents": [64, 768]}


def test_ellas_file_has_the_released_layout(tmp_path: Path) -> None:
    torch.manual_seed(0)
    bridge = Bridge(TSCConfig()).eval()
    path = save_ella(bridge.connector.state_dict(), bridge.config, tmp_path / RELEASED)
    found = load_file(path)
    assert {name: list(tensor.shape) for name, tensor in found.items()} == released_layout()
    assert len(found) == 93 and sum(t.numel() for t in found.values()) == 66_820_608
    assert {tensor.dtype for tensor in found.values()} == {torch.float16}
    loaded = load_ella(path)
    hidden, mask, times = torch.randn(1, 5, 2048), torch.ones(1, 5, dtype=torch.bool), torch.tensor([500.0])
    with torch.no_grad():
        ours, theirs = bridge.half().float()(hidden, mask, times), loaded(hidden, mask, times)
    assert torch.equal(ours.tokens, theirs.tokens) and not any(p.requires_grad for p in loaded.parameters())


def test_its_name_stands_for_what_it_is() -> None:
    released = LanguageModelConfig(model="google/flan-t5-xl", dtype="float16", max_length=128, padding="fixed")
    assert file_name(TSCConfig(), released) == RELEASED and arguments(TSCConfig(use_mask="mask")) == {}
    for connector in (TSCConfig(queries=128), TSCConfig(use_mask="mask")):
        assert file_name(connector, released) == "ella-tsc.safetensors"
    for other in (
        replace(released, model="TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
        replace(released, dtype="bfloat16"),
        replace(released, max_length=256),
        replace(released, padding="longest"),
        replace(released, pads="seen"),
        replace(released, quantize="8bit"),
    ):
        assert file_name(TSCConfig(), other) == "ella-tsc.safetensors"
    assert arguments(TSCConfig(queries=128, width=1024)) == {"width": 1024, "num_latents": 128}


@pytest.mark.parametrize(
    ("connector", "problem"),
    [
        (MLPConfig(), "knows the tsc alone, this connector is a mlp: export to diffusers instead"),
        (TSCConfig(timestep="adaln_zero"), "knows no tsc with timestep 'adaln_zero'"),
        (TSCConfig(timestep="off"), "knows no tsc with timestep 'off'"),
        (TSCConfig(layers=3), "knows no tsc with layers 3"),
        (TSCConfig(pooled_width=1280), "knows no tsc with pooled_width 1280"),
    ],
)
def test_what_ellas_code_does_not_know_is_refused(
    connector: MLPConfig | TSCConfig, problem: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=problem):
        save_ella({}, connector, tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "changes", [{"layers": -2}, {"layers": "mean"}, {"template": "chat"}, {"instruction": "Draw this: "}]
)
def test_features_that_ellas_code_does_not_make_are_refused(changes: dict[str, Any]) -> None:
    ((name, value),) = changes.items()
    config = LanguageModelConfig(model="google/flan-t5-xl", **changes)
    with pytest.raises(
        ValueError, match=rf"knows no language_model with {name} {value!r}: export to diffusers instead"
    ):
        check_features(config)


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="big has values that float16 cannot hold"):
        save_ella({"big": torch.tensor([1e6])}, TSCConfig(), tmp_path / "x.safetensors")


def test_another_file_is_no_ella(tmp_path: Path) -> None:
    save_file({"connector.latents": torch.zeros(4, 16)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="is missing: is it another connector"):
        load_ella(tmp_path / "x.safetensors", tsc_config())
    with pytest.raises(FileNotFoundError, match=r"name ELLA's \.safetensors file"):
        load_ella(tmp_path / "none.safetensors")
    (tmp_path / "page.safetensors").write_text("<!DOCTYPE html><html>not found</html>")
    with pytest.raises(ValueError, match=r"page\.safetensors is no safetensors file .*: download it again"):
        load_ella(tmp_path / "page.safetensors", tsc_config())
    path = save_ella(Bridge(tsc_config()).connector.state_dict(), tsc_config(), tmp_path / "y.safetensors")
    with pytest.raises(ValueError, match=r"connector\.latents has shape"):
        load_ella(path, replace(tsc_config(), queries=5))
