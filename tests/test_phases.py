"""What a phase takes over from the one before, and that a run which stops anywhere takes it over exactly once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.storage import Folder
from tests.training_fixtures import make_world, training_config
from training import loop
from training.checkpoints import latest_checkpoint
from training.configuration import TrainingConfig
from training.loop import train
from training.phases import TimestepConfig

EDGE = 48
"""Samples of the first phase; the second has 36 in steps of 12."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def config_of(world: Path, **changes: str) -> TrainingConfig:
    base = training_config(world)
    first, second = base.phases
    return dataclasses.replace(base, phases=(first, dataclasses.replace(second, **changes)))  # type: ignore[arg-type]


def run_of(config: TrainingConfig, world: Path, run: Path) -> Path:
    train(config, dataset=Folder(url=str(world / "dataset")), run=run)
    return run


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    """Of the newest checkpoint: what is trained, AdamW's moments and the average."""
    path = latest_checkpoint(run)
    assert path is not None
    found = {}
    for name in ("trained", "optimizer", "ema"):
        found |= {f"{name}/{key}": tensor for key, tensor in load_file(path / f"{name}.safetensors").items()}
    return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def crash_at(samples: int) -> Callable[..., Any]:
    """A `_commit` after which the run dies, once so many samples are committed, before anything is saved."""
    commit = loop._commit

    def crashing(sitting, state, *rest):
        commit(sitting, state, *rest)
        if state.samples == samples:
            raise KeyboardInterrupt

    return crashing


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights at the end of an undisturbed run that keeps nothing."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    return weights_of(run_of(config_of(world, optimizer="fresh", ema="fresh"), world, run))


@pytest.mark.parametrize("stop_at", [24, EDGE, EDGE + 12])
def test_a_run_stopped_anywhere_hands_over_once(
    world: Path, whole: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    """In either phase, and on the edge: with the end of phase 1 saved, and the first step of phase 2 lost."""
    config = config_of(world, optimizer="fresh", ema="fresh")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "_commit", crash_at(stop_at + 12))
        run_of(config, world, tmp_path / "cut")
    found = latest_checkpoint(tmp_path / "cut")
    assert found is not None and found.name == f"checkpoint-{stop_at:09d}"
    assert same(weights_of(run_of(config, world, tmp_path / "cut")), whole)


def test_fresh_begins_where_a_run_of_that_phase_alone_would(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step of phase 2: AdamW's moments are of its gradient alone, the average of its start and end."""
    seen: dict[str, list[dict[str, torch.Tensor]]] = {}
    save = loop._save

    def spy(sitting, state):
        save(sitting, state)
        if state.samples in (EDGE, EDGE + 12):
            sitting.writer.wait()
            run = sitting.journal.run
            seen.setdefault(run.name, []).append(weights_of(run))

    monkeypatch.setattr(loop, "_save", spy)
    for name in ("keep", "fresh"):
        run_of(config_of(world, optimizer=name, ema=name), world, tmp_path / name)
    for name, (edge, first) in seen.items():
        assert same(edge, seen["keep"][0])
        steps = {float(tensor) for key, tensor in first.items() if key.startswith("optimizer/step/")}
        assert steps == ({1.0} if name == "fresh" else {5.0})
        begin = {key.removeprefix("trained/"): one for key, one in edge.items() if key.startswith("trained/")}
        for key, start in begin.items():
            now, average = first[f"trained/{key}"], first[f"ema/{key}"]
            # Its first step weighs 9 / 11: the ramp begins anew with the average.
            expected = start.lerp(now, 9 / 11) if name == "fresh" else edge[f"ema/{key}"].lerp(now, 1 - 6 / 15)
            assert torch.allclose(average, expected, atol=1e-7), key
        moments = [key for key in first if key.startswith("optimizer/exp_avg_sq/")]
        decayed = all(bool((first[key] >= 0.998 * edge[key]).all()) for key in moments)
        assert decayed is (name == "keep")
    assert not same(seen["keep"][1], seen["fresh"][1])


def test_a_finished_run_lengthened_by_a_phase_hands_over_too(
    world: Path, whole: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    config = config_of(world, optimizer="fresh", ema="fresh")
    run_of(dataclasses.replace(config, phases=config.phases[:1]), world, tmp_path / "long")
    run_of(config, world, tmp_path / "long")
    assert same(weights_of(tmp_path / "long"), whole)


def test_a_hand_over_that_cannot_be_is_refused(world: Path) -> None:
    with pytest.raises(ValueError, match="phase 'large': optimizer is 'new': choose one of keep, fresh"):
        config_of(world, optimizer="new")
    with pytest.raises(
        ValueError, match=r"phase 'large': ema is 'fresh', but training.ema_decay None keeps no average"
    ):
        dataclasses.replace(config_of(world, ema="fresh"), ema_decay=None)


def test_wrong_timesteps_are_refused() -> None:
    for changes, problem in (
        ({"share": 1.5}, "timesteps.share is 1.5"),
        ({"kind": "mode"}, "timesteps.kind is 'mode': choose one of uniform, high_noise, logit_normal"),
        ({"deviation": 0.0}, "timesteps.deviation 0.0: give finite ones, the deviation above 0"),
        ({"mean": float("nan")}, "timesteps.mean is nan"),
    ):
        with pytest.raises(ValueError, match=problem):
            TimestepConfig(**changes)  # type: ignore[arg-type]
