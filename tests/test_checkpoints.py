"""Checkpoints survive what may happen to them, and a release is loaded only with what it was trained for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.fingerprint import plain
from tests.training_fixtures import tsc_config
from training import checkpoints, whole_files
from training.bridge import Bridge
from training.checkpoints import State, checkpoint_problem, latest_checkpoint, restore, tensors_of, write_checkpoint


def phase(view: str) -> dict[str, Any]:
    """As `parts.facts_of` has it."""
    return {"views": {view: {"manifest_sha256": "0"}}}


FACTS = {"connector": plain(tsc_config()), "training": {"seed": 1}, "phases": [phase("a"), phase("b")]}


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
    state = State(samples=samples, window=[[0.1]])
    return write_checkpoint(run, state, FACTS, tensors_of(module, optimizer, None), keep=keep)


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    module, optimizer = stepped(0)
    ema = {name: tensor.clone() + 1 for name, tensor in module.state_dict().items()}
    state = State(step=3, phase=1, position=7, samples=19, window=[[1 / 3], [0.1]], scaler={"scale": 2.0})
    path = write_checkpoint(tmp_path, state, FACTS, tensors_of(module, optimizer, ema), keep=2)
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
    monkeypatch.setattr("training.checkpoints.write_json", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match=r"disk full"):
        save(tmp_path, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == names


FILES = ("trained.safetensors", "optimizer.safetensors", "ema.safetensors", "checkpoint.json")


def spoil(path: Path, how: str) -> None:
    data = path.read_bytes()
    match how:
        case "flip":
            middle = len(data) // 2
            path.write_bytes(data[:middle] + bytes([data[middle] ^ 0x10]) + data[middle + 1 :])
        case "cut":
            path.write_bytes(data[: len(data) // 3])
        case "empty":
            path.write_bytes(b"")
        case "missing":
            path.unlink()
        case "list":
            path.write_text("[]")


@pytest.mark.parametrize("how", ["flip", "cut", "empty", "missing", "list"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_falls_back(tmp_path: Path, name: str, how: str, capsys: pytest.CaptureFixture) -> None:
    module, optimizer = stepped(1)
    tensors = tensors_of(module, optimizer, module.state_dict())
    good, bad = (write_checkpoint(tmp_path, State(samples=n), FACTS, tensors, keep=2) for n in (1, 2))
    spoil(bad / name, how)
    (tmp_path / ".checkpoint-000000003.12345678").mkdir()
    assert latest_checkpoint(tmp_path) == good
    assert not list(tmp_path.glob(".checkpoint-*"))
    assert len(list(tmp_path.glob("damaged-checkpoint-000000002-*"))) == 1
    assert "checkpoint-000000002 is damaged (" in capsys.readouterr().out


def test_where_none_is_whole_nothing_is_started_anew(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "nothing") is None
    for samples in (1, 2):
        spoil(save(tmp_path, samples) / "trained.safetensors", "cut")
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"no checkpoint in .* is whole \(checkpoint-000000002: trained.*000000001: t"
        ):
            latest_checkpoint(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-000000001", "checkpoint-000000002"]


def test_no_flipped_bit_of_the_counts_is_believed(tmp_path: Path) -> None:
    """Whatever byte of checkpoint.json changes: it is found, or the file still says the same."""
    path = save(tmp_path, 7) / "checkpoint.json"
    data = path.read_bytes()
    said, unseen = json.loads(data), 0
    for place in range(len(data)):
        for bit in (0x01, 0x20):
            path.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
            if checkpoint_problem(path.parent) is None:
                assert json.loads(path.read_bytes()) == said
                unseen += 1
    assert unseen < len(data) / 10  # spaces between its words
    path.write_bytes(data)
    assert checkpoint_problem(path.parent) is None


def test_a_checkpoint_of_another_version_is_told_as_such(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    found = json.loads((path / "checkpoint.json").read_bytes()) | {"format": 2}
    del found[checkpoints.DIGEST]  # which format 2 had not
    (path / "checkpoint.json").write_text(json.dumps(found))
    assert latest_checkpoint(tmp_path) == path
    with pytest.raises(ValueError, match="has format 2, this version reads 3: start a new run folder"):
        restore(path, FACTS, *stepped(0), None)


@pytest.mark.parametrize("state", [{"samples": 7, "another": 1}, ["samples"], None])
def test_a_state_of_another_kind_falls_back(tmp_path: Path, state: Any) -> None:
    good, path = save(tmp_path, 6), save(tmp_path, 7) / "checkpoint.json"
    found = json.loads(path.read_bytes()) | {"state": state}
    del found[checkpoints.DIGEST]
    path.write_text(json.dumps(found | {checkpoints.DIGEST: checkpoints._digest_of_json(found)}))
    assert latest_checkpoint(tmp_path) == good


def test_what_was_being_replaced_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies between the two renames leaves neither the former nor the next release under their name."""
    rename = Path.rename

    def dies(path: Path, target: Path) -> Path:
        if target == tmp_path / "best" and path.name.startswith(".best."):
            raise KeyboardInterrupt
        return rename(path, target)

    with whole_files.publishing(tmp_path / "best") as aside:
        (aside / "connector.json").write_text("former")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dies)
        patch.setattr(whole_files.shutil, "rmtree", lambda *_, **__: None)  # nor does it clear up
        with pytest.raises(KeyboardInterrupt), whole_files.publishing(tmp_path / "best") as aside:
            (aside / "connector.json").write_text("next")
    assert not (tmp_path / "best").exists() and len(list(tmp_path.iterdir())) == 2
    assert latest_checkpoint(tmp_path) is None
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    assert (tmp_path / "best" / "connector.json").read_text() == "former"
    shutil.copytree(tmp_path / "best", tmp_path / ".old-best.12345678")  # died after both
    latest_checkpoint(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_a_checkpoint_holds_what_is_trained_and_no_more(tmp_path: Path) -> None:
    """Weights, two moments and the average, of four bytes each, and a count of steps by parameter."""
    module, optimizer = stepped(0)
    trained = sum(parameter.numel() for parameter in module.parameters())
    counts = len(list(module.parameters()))
    for samples, ema in ((1, None), (2, dict(module.state_dict()))):
        path = write_checkpoint(tmp_path, State(samples=samples), FACTS, tensors_of(module, optimizer, ema), keep=2)
        held = sum(t.nbytes for file in path.glob("*.safetensors") for t in load_file(file).values())
        assert held == 4 * (trained * (3 + bool(ema)) + counts)
        size = sum(file.stat().st_size for file in path.iterdir())
        assert held < size < held + 400 * 4 * counts  # names and shapes


def test_a_mismatch_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    module, optimizer = stepped(0)
    with pytest.raises(ValueError, match=r"cannot be resumed: training.seed is 1 there and 2 here"):
        restore(path, FACTS | {"training": {"seed": 2}}, module, optimizer, None)
    with pytest.raises(ValueError, match=r"phases\[0\].views.a is .* there and None here"):
        restore(path, FACTS | {"phases": [phase("c")]}, module, optimizer, None)
    restore(path, FACTS | {"phases": [phase("a"), phase("c"), phase("d")]}, module, optimizer, None)
