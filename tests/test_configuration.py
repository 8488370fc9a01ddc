"""The settings of a run: the learning rate they give, and what they refuse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.training_fixtures import language_model_config, training_config, tsc_config
from training.configuration import DenoiserConfig, LoRAConfig, Phase
from training.phases import rate_at

PHASE = Phase(view="512", resolution=8, samples=100, batch=10, micro_batch=5, rate=1.0)


def test_rate_rises_and_falls_with_committed_samples() -> None:
    warm = replace(PHASE, warmup_samples=40)
    assert [rate_at(warm, p) for p in (0, 10, 30, 90)] == [0.25, 0.5, 1.0, 1.0]
    cosine, linear = replace(PHASE, schedule="cosine"), replace(PHASE, schedule="linear")
    assert [rate_at(linear, p) for p in (0, 50, 90)] == pytest.approx([1, 0.5, 0.1])
    assert [rate_at(cosine, p) for p in (0, 50, 90)] == pytest.approx([1, 0.5, 0.0245], abs=1e-3)
    assert rate_at(replace(warm, schedule="linear"), 20) == pytest.approx(0.75 * 0.8)


def test_a_micro_batch_is_no_more_than_a_processs_share() -> None:
    whole = replace(PHASE, micro_batch=10)
    assert [whole.micro_batch_of(n) for n in (1, 2, 5, 20)] == [10, 5, 2, 1]
    assert [PHASE.micro_batch_of(n) for n in (1, 2, 5)] == [5, 5, 2]


def test_wrong_phases_are_refused() -> None:
    for changes, problem in (
        ({"samples": 95}, "samples 95 is not a multiple of batch 10: use 100"),
        ({"micro_batch": 3}, "batch 10 is not a multiple of micro_batch 3"),
        ({"schedule": "step"}, "schedule is 'step': choose one of constant, cosine, linear"),
        ({"rate": 0.0}, "rate must be above 0"),
        ({"resolution": 0}, "resolution is 0"),
    ):
        with pytest.raises(ValueError, match=problem):
            replace(PHASE, **changes)


def test_wrong_runs_are_refused(tmp_path: Path) -> None:
    for changes, problem in (
        ({"phases": ()}, "training.phases is empty"),
        ({"caption_drop": 2.0}, "training.caption_drop is 2.0"),
        ({"keep_checkpoints": 1}, "at least 2"),
        ({"precision": "int8"}, "training.precision is 'int8'"),
        ({"ema_decay": 1.0}, "training.ema_decay is 1.0"),
        ({"clip": 0.0}, "training.clip must be above 0"),
    ):
        with pytest.raises(ValueError, match=problem):
            training_config(tmp_path, **changes)
    half = DenoiserConfig(model="any", dtype="float16")
    with pytest.raises(
        ValueError, match=r"denoiser.dtype is 'float16' and training.precision 'no': gradients would vanish"
    ):
        training_config(tmp_path, denoiser=half)
    training_config(tmp_path, denoiser=half, precision="fp16")
    frozen = language_model_config(tmp_path, dtype="float16")
    training_config(tmp_path, language_model=frozen)  # nothing goes back through it
    with pytest.raises(ValueError, match=r"language_model.dtype is 'float16'"):
        training_config(tmp_path, language_model=replace(frozen, lora=LoRAConfig(targets=(".*",))))
    for wrong, problem in (({"layers": 1.5}, "layers is 1.5"), ({"layers": True}, "layers is True")):
        with pytest.raises(ValueError, match=problem):
            language_model_config(tmp_path, **wrong)
    with pytest.raises(ValueError, match=r"lora.targets is the text '.\*q'"):
        LoRAConfig(targets=".*q")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="use_mask 'all' sees pads"):
        training_config(
            tmp_path,
            connector=replace(tsc_config(), use_mask="all"),
            language_model=language_model_config(tmp_path, padding="longest"),
        )
