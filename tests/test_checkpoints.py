"""Checkpoints survive what may happen to them, and a release is loaded only with what it was trained for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.fingerprint import plain
from tests.training_fixtures import language_model_config, make_denoiser, make_world, tsc_config
from training.bridge import Bridge
from training.checkpoints import (
    State,
    checkpoint_problem,
    latest_checkpoint,
    load_bridge,
    read_release,
    restore,
    save_checkpoint,
    write_release,
)
from training.denoisers import DenoiserConfig

FACTS = {"connector": plain(tsc_config()), "training": {"seed": 1}, "phases": [{"view": "a"}, {"view": "b"}]}


def stepped(seed: int) -> tuple[Bridge, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    module = Bridge(tsc_config())
    optimizer = torch.optim.AdamW(module.parameters())
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return module, optimizer


def save(run: Path, samples: int, keep: int = 2) -> Path:
    module, optimizer = stepped(samples)
    return save_checkpoint(run, State(samples=samples, window=[[0.1]]), FACTS, module, optimizer, None, keep)


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    module, optimizer = stepped(0)
    ema = {name: tensor.clone() + 1 for name, tensor in module.state_dict().items()}
    state = State(step=3, phase=1, position=7, samples=19, window=[[1 / 3], [0.1]], scaler={"scale": 2.0})
    path = save_checkpoint(tmp_path, state, FACTS, module, optimizer, ema, 2)
    assert path.name == "checkpoint-000000019" and checkpoint_problem(path) is None
    other, other_optimizer = stepped(1)
    other_ema = {name: torch.zeros_like(tensor) for name, tensor in ema.items()}
    assert restore(path, FACTS, other, other_optimizer, other_ema) == state
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in module.state_dict().items())
    assert all(torch.equal(other_ema[name], tensor) for name, tensor in ema.items())
    ours, theirs = (o.state_dict()["state"] for o in (optimizer, other_optimizer))
    assert ours.keys() == theirs.keys() and len(ours) == len(list(module.parameters()))
    for number, one in ours.items():
        assert one.keys() == theirs[number].keys()
        assert all(torch.equal(tensor, theirs[number][key]) for key, tensor in one.items())


def test_old_ones_go_only_after_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for samples in (1, 2, 3):
        save(tmp_path, samples)
    names = ["checkpoint-000000002", "checkpoint-000000003"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    monkeypatch.setattr("training.checkpoints._write_json", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match=r"disk full"):
        save(tmp_path, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "json", "list"])
def test_a_damaged_checkpoint_falls_back(tmp_path: Path, damage: str) -> None:
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    weights = bad / "trained.safetensors"
    match damage:
        case "flip":
            data = bytearray(weights.read_bytes())
            data[-1] ^= 1
            weights.write_bytes(data)
        case "cut":
            weights.write_bytes(weights.read_bytes()[:-1])
        case "missing":
            weights.unlink()
        case "json":
            (bad / "checkpoint.json").write_text("{")
        case "list":
            (bad / "checkpoint.json").write_text("[]")
    (tmp_path / ".checkpoint-000000003.12345678").mkdir()
    assert latest_checkpoint(tmp_path) == good
    assert not list(tmp_path.glob(".checkpoint-*"))
    assert len(list(tmp_path.glob("damaged-checkpoint-000000002-*"))) == 1
    assert latest_checkpoint(tmp_path / "nothing") is None


def test_a_mismatch_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    module, optimizer = stepped(0)
    with pytest.raises(ValueError, match=r"cannot be resumed: training.seed is 1 there and 2 here"):
        restore(path, FACTS | {"training": {"seed": 2}}, module, optimizer, None)
    with pytest.raises(ValueError, match=r"phases\[0\].view is 'a' there and 'c' here"):
        restore(path, FACTS | {"phases": [{"view": "c"}]}, module, optimizer, None)
    restore(path, FACTS | {"phases": [{"view": "a"}, {"view": "c"}, {"view": "d"}]}, module, optimizer, None)


def test_a_release_is_loaded_only_where_it_fits(tmp_path: Path) -> None:
    root = make_world(tmp_path)
    language_model = language_model_config(root).load()
    denoiser = DenoiserConfig(model=str(root / "models" / "base")).load()
    facts = FACTS | {
        "language_model": language_model.identity(), "denoiser": denoiser.identity(), "beside": None,
    }  # fmt: skip
    models = {"language_model": language_model, "denoiser": denoiser}
    module, _ = stepped(0)
    told = read_release(write_release(tmp_path / "told", facts, State(samples=9), module, None))
    assert {name: told[name] for name in facts} == facts  # its training and its phases too
    ema = {name: tensor + 1 for name, tensor in module.state_dict().items()}
    folder = write_release(tmp_path, facts, State(samples=9), module, ema)
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
    write_release(tmp_path, facts, State(samples=10), module, None)  # again, over the former
    assert json.loads((folder / "connector.json").read_text())["samples"] == 10
    assert not (folder / "ema.connector.safetensors").exists()
    with pytest.raises(FileNotFoundError, match=r"holds no averages"):
        load_bridge(folder, **models, weights="ema")
