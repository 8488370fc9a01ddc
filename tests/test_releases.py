"""A release is loaded only with what it was trained for, and holds only what was trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.test_checkpoints import FACTS, stepped
from tests.training_fixtures import language_model_config, make_denoiser, make_world
from training.checkpoints import State
from training.denoisers import DenoiserConfig
from training.releases import load_bridge, read_release, write_release


def test_a_release_holds_what_is_trained_and_no_more(tmp_path: Path) -> None:
    module, _ = stepped(0)
    facts = FACTS | {"language_model": {}, "denoiser": {}, "beside": None}
    folder = write_release(tmp_path, facts, State(), module.state_dict(), module.state_dict())
    trained = sum(parameter.nbytes for parameter in module.parameters())
    for name in ("connector.safetensors", "ema.connector.safetensors"):
        data = (folder / name).read_bytes()
        assert len(data) - 8 - int.from_bytes(data[:8], "little") == trained


def test_a_release_is_loaded_only_where_it_fits(tmp_path: Path) -> None:
    root = make_world(tmp_path)
    language_model = language_model_config(root).load()
    denoiser = DenoiserConfig(model=str(root / "models" / "base")).load()
    facts = FACTS | {
        "language_model": language_model.identity(), "denoiser": denoiser.identity(), "beside": None,
    }  # fmt: skip
    models = {"language_model": language_model, "denoiser": denoiser}
    module, _ = stepped(0)
    told = read_release(write_release(tmp_path / "told", facts, State(samples=9), module.state_dict(), None))
    assert {name: told[name] for name in facts} == facts  # its training and its phases too
    ema = {name: tensor + 1 for name, tensor in module.state_dict().items()}
    folder = write_release(tmp_path, facts, State(samples=9), module.state_dict(), ema)
    latents = "connector.connector.latents"
    averaged = load_bridge(folder, **models)
    assert torch.equal(averaged.state_dict()[latents], ema[latents])
    last = load_bridge(folder, **models, weights="last")
    assert torch.equal(last.state_dict()[latents], module.state_dict()[latents])
    assert not any(parameter.requires_grad for parameter in last.parameters())
    language_model.config = replace(language_model.config, dtype="float16")
    with pytest.raises(ValueError, match=r"language_model.dtype is 'float32' there and 'float16' here"):
        load_bridge(folder, **models)
    load_bridge(folder, **models, check="connector")
    language_model.config = replace(language_model.config, dtype="float32")
    other = DenoiserConfig(model=str(make_denoiser(tmp_path / "epsilon", prediction_type="epsilon"))).load()
    with pytest.raises(ValueError, match=r"denoiser\.\w+ is .* there and .* here: use the one it was trained with"):
        load_bridge(folder, language_model=language_model, denoiser=other)
    (folder / "ema.connector.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"ema.connector.safetensors is damaged"):
        load_bridge(folder, **models)
    with pytest.raises(FileNotFoundError, match=r"name the `release` folder"):
        load_bridge(tmp_path, **models)
    write_release(tmp_path, facts, State(samples=10), module.state_dict(), None)  # again, over the former
    assert json.loads((folder / "connector.json").read_text())["samples"] == 10
    assert not (folder / "ema.connector.safetensors").exists()
    with pytest.raises(FileNotFoundError, match=r"holds no averages"):
        load_bridge(folder, **models, weights="ema")
