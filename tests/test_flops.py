"""Counting FLOPs changes nothing and knows every kernel; the measured peak. Of published models: `test_full_shape`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from pipeline.storage import Folder
from tests.training_fixtures import make_world, training_config
from training import flops
from training.batches import Batch, Batches
from training.flops import peak_of, sample_flops
from training.parts import Parts, batch_config, load_parts
from training.processes import start_processes
from training.views import open_views


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Parts, Batch]:
    root = make_world(tmp_path_factory.mktemp("world"))
    config = training_config(root)
    views = open_views(config, Folder(url=str(root / "dataset")))
    parts = load_parts(config, start_processes(config))
    with Batches(views[0], batch_config(config, 0, parts)) as batches:
        return parts, next(batches)


def test_counting_leaves_nothing_behind(tiny: tuple[Parts, Batch]) -> None:
    parts, batch = tiny
    before = {name: tensor.clone() for name, tensor in parts.bridge.state_dict().items()}
    state = torch.get_rng_state()
    found = sample_flops(parts, batch)
    assert found.encoding > 0 and found.training > 0 and found == sample_flops(parts, batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in parts.bridge.state_dict().items())
    assert all(parameter.grad is None for parameter in parts.bridge.parameters())


def test_what_is_computed_twice_counts_once(tiny: tuple[Parts, Batch]) -> None:
    parts, batch = tiny
    plain = sample_flops(parts, batch)
    parts.denoiser.network.enable_gradient_checkpointing()
    try:
        assert sample_flops(parts, batch) == plain
        assert parts.denoiser.network.is_gradient_checkpointing
    finally:
        parts.denoiser.network.disable_gradient_checkpointing()


@pytest.mark.parametrize("frozen", [False, True])
def test_attention_counts_alike_in_every_kernel(frozen: bool) -> None:
    """The processor's fused kernel as its plain products: two forwards, four backwards."""
    queries, keys, values = (torch.randn(2, 3, n, 8, requires_grad=not frozen) for n in (5, 7, 7))
    with flops._counter() as counter:
        out = F.scaled_dot_product_attention(queries, keys, values)
        if not frozen:
            out.sum().backward()
    assert counter.get_total_flops() == (2 if frozen else 6) * 2 * 2 * 3 * 5 * 7 * 8


def test_the_peak_is_kept_in_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flops, "_SECONDS", 0.01)
    cpu = torch.device("cpu")
    first = peak_of(tmp_path, cpu, torch.float32)
    assert first.flops > 0 and first.measured == "measured"
    assert json.loads((tmp_path / "peak.json").read_text()) == {first.device: first.flops}
    again = peak_of(tmp_path, cpu, torch.float32)
    assert (again.flops, again.measured) == (first.flops, "measured before")
    assert peak_of(tmp_path, cpu, torch.bfloat16).measured == "measured"  # another type is another peak
    (tmp_path / "peak.json").write_text('{"half')
    assert peak_of(tmp_path, cpu, torch.float32).measured == "measured"
