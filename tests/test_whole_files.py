"""A folder appears whole or not at all, and tensors come back as they were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from training.whole_files import load_weights, locked, publishing, save_weights


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "folder"
    for text in ("one", "two"):  # the second takes the place of the first
        with publishing(final) as aside:
            (aside / text).write_text(text)
            assert not (final / text).exists()
        assert [path.name for path in final.iterdir()] == [text]
    with pytest.raises(KeyError), publishing(final) as aside:
        (aside / "three").write_text("three")
        raise KeyError
    assert [path.name for path in final.iterdir()] == ["two"] and list(final.parent.iterdir()) == [final]


def test_weights_come_back_and_what_is_off_is_named(tmp_path: Path) -> None:
    module, other = nn.Linear(3, 2), nn.Linear(3, 2)
    path = tmp_path / "weights.safetensors"
    save_weights({"strided": torch.arange(6.0).reshape(2, 3).T, **module.state_dict()}, path)
    load_weights(other, module.state_dict(), path)
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in module.state_dict().items())
    for wrong, said in (
        ({"weight": module.weight}, "bias is missing"),
        ({**module.state_dict(), "more": module.bias}, "more is not known"),
        ({**module.state_dict(), "bias": torch.zeros(3)}, r"bias has shape \[3\], the connector \[2\]"),
    ):
        with pytest.raises(ValueError, match=said):
            load_weights(other, wrong, path)


def test_a_folder_is_held_by_one(tmp_path: Path) -> None:
    for _ in range(2):
        with locked(tmp_path), pytest.raises(ValueError, match="another training's that still runs"), locked(tmp_path):
            pass
