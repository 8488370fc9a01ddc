"""Out of memory: one line with the arithmetic of what would fit, and no process that waits for ever."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.storage import Folder
from tests.training_fixtures import make_world, training_config
from training import loop, memory, step
from training.configuration import Phase, ValidationConfig
from training.flops import Peak
from training.memory import Gauge, advice, held, largest_micro_batch, sample_bytes
from training.parts import Parts, load_parts
from training.processes import start_processes

MIB = 2**20


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def parts(world: Path) -> Parts:
    config = training_config(world)
    return load_parts(config, start_processes(config))


class FakeGauge(Gauge):
    """A device with `total` bytes, of which `static` are held and each sample of a forward pass takes `sample`."""

    def __init__(self, total: int, static: int, sample: int) -> None:
        self.total, self.static, self.sample, self.most = total, static, sample, 0

    def allocated(self) -> int:
        return self.static

    def free(self) -> int:
        return self.total - self.static

    def reset(self) -> None:
        self.most = self.static

    def peak(self) -> int:
        return self.most

    def see(self, samples: int) -> None:
        """What a forward pass of so many samples does."""
        self.most = max(self.most, self.static + samples * self.sample)
        if self.most > self.total:
            raise torch.OutOfMemoryError("Tried to allocate 1.00 GiB.")


def counted(gauge: FakeGauge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets every forward pass take the gauge's memory."""
    losses_of = step.losses_of

    def counting(parts, encoded, draws):
        gauge.see(len(encoded.latents))
        return losses_of(parts, encoded, draws)

    monkeypatch.setattr(step, "losses_of", counting)
    monkeypatch.setattr(memory, "losses_of", counting)


def test_what_is_held_is_the_size_of_its_tensors(parts: Parts) -> None:
    found, trained = held(parts), sum(p.numel() for p in parts.bridge.parameters())
    assert (found.weights, found.gradients, found.moments) == (4 * trained, 4 * trained, 8 * trained)
    assert found.average == sum(4 * one.numel() for one in parts.bridge.state_dict().values())
    models = (parts.language_model.module, parts.denoiser.network, parts.denoiser.vae)
    assert found.frozen == sum(4 * p.numel() for model in models for p in model.parameters())
    assert found.total == found.frozen + 16 * trained + found.average


def test_one_sample_is_measured_without_a_trace(world: Path, parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real models: nothing is averaged over processes, no gradient stays, and nothing is drawn."""
    gauge = FakeGauge(100 * MIB, 10 * MIB, 3 * MIB)
    counted(gauge, monkeypatch)
    wrapped = replace(parts, wrapped=None)  # type: ignore[arg-type]  # what averages gradients must not be called
    state = torch.get_rng_state()
    for number, times in ((0, 1), (1, 1), (0, 4)):
        config = training_config(world, timesteps_per_encoding=times)
        assert sample_bytes(config, number, wrapped, gauge) == 3 * MIB * times
    assert all(p.grad is None for p in parts.bridge.parameters()) and torch.equal(torch.get_rng_state(), state)
    assert sample_bytes(config, 0, wrapped, FakeGauge(100 * MIB, 10 * MIB, 3 * MIB)) == 0
    gauge.sample = 91 * MIB
    assert sample_bytes(config, 0, wrapped, gauge) is None


@pytest.mark.parametrize(
    ("batch", "processes", "most", "best"),
    [(256, 8, 31, 16), (12, 1, 5, 4), (12, 3, 3, 2), (12, 2, 1, 1), (12, 2, 0, 0)],
)
def test_the_largest_micro_batch_divides_a_processs_share(batch: int, processes: int, most: int, best: int) -> None:
    phase = Phase(view="any", resolution=8, samples=batch, batch=batch, micro_batch=batch)
    assert largest_micro_batch(phase, processes, most) == best
    if best:
        assert replace(phase, micro_batch=best).micro_batch_of(processes) == best


@pytest.mark.parametrize(
    ("total", "said"),
    [
        (
            40,
            r"each sample 5.0 MiB, and 38.0 MiB are usable, so 5 samples fit: set the phase's micro_batch to 4, or set",
        ),
        (
            16,
            r"each sample 5.0 MiB, and 15.2 MiB are usable, so 1 samples fit: set the phase's micro_batch to 1, or set",
        ),
        (
            14,
            r" of 13.3 MiB that are usable, and not even one sample fits beside them: set denoiser.gradient_checkpointing",
        ),
    ],
)
def test_a_step_that_does_not_fit_says_what_would(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, total: int, said: str
) -> None:
    gauge = FakeGauge(total * MIB, 10 * MIB, 5 * MIB)
    counted(gauge, monkeypatch)
    monkeypatch.setattr(loop, "gauge_of", lambda device: gauge)
    phase = Phase(view="small", resolution=8, samples=24, batch=12, micro_batch=12)
    config = training_config(world, phases=(phase,))
    gauge.reset()
    with pytest.raises(MemoryError, match=said) as failed:
        loop.train(config, dataset=Folder(url=str(world / "dataset")), run=tmp_path)
    assert "\n" not in str(failed.value) and "in phase 'small' with micro_batch 12: the frozen models" in str(
        failed.value
    )
    assert failed.value.__context__ is None  # the failed step's tensors are gone
    if "to 4" in said:  # and it does fit
        gauge.reset()
        smaller = training_config(world, phases=(replace(phase, micro_batch=4),))
        loop.train(smaller, dataset=Folder(url=str(world / "dataset")), run=tmp_path)


def test_what_is_encoded_ahead_counts(world: Path, parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    gauge, config = FakeGauge(100 * MIB, 10 * MIB, 3 * MIB), training_config(world)
    counted(gauge, monkeypatch)
    encode = memory.encode

    def encoding(*given):
        gauge.most += MIB
        return encode(*given)

    monkeypatch.setattr(memory, "encode", encoding)
    assert sample_bytes(config, 0, parts, gauge) == 3 * MIB
    assert "encode_ahead" not in advice(config, 0, parts, None)
    monkeypatch.setattr(memory, "encodes_ahead", lambda *_: True)
    assert sample_bytes(config, 0, parts, gauge) == 4 * MIB
    assert "set speed.encode_ahead to False" in advice(config, 0, parts, None)


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (
            "load_parts",
            "while the models were loaded: set denoiser.dtype and language_model.dtype to 'bfloat16', or take",
        ),
        ("Validation.run", "in a validation: lower validation.batch or validation.resolution, or take a device"),
        ("CheckpointWriter.save", "while a checkpoint was copied into the host's memory: leave it room"),
    ],
)
def test_the_part_that_ran_out_is_named(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, said: str
) -> None:
    def fails(*_: object) -> None:
        torch.empty(2**50)  # what a processor's allocator says is a RuntimeError

    monkeypatch.setattr(f"training.loop.{part}", fails)
    validation = ValidationConfig(every=24, resolution=8, prompts=("red",), steps=1, clip=None)
    config = training_config(world, validation=validation if part == "Validation.run" else None)
    with pytest.raises(MemoryError, match=f"^out of memory {said}"):
        loop.train(config, dataset=Folder(url=str(world / "dataset")), run=tmp_path)


def test_flops_that_cannot_be_counted_end_no_run(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 1.00 GiB.")

    config = training_config(world, measure_peak=True)
    monkeypatch.setattr(loop, "peak_of", lambda *_: Peak(device="a device", flops=1e12, measured="measured"))
    monkeypatch.setattr(loop, "sample_flops", fails)
    loop.train(config, dataset=Folder(url=str(world / "dataset")), run=tmp_path)
    assert capsys.readouterr().out.count("of a sample were counted: set training.measure_peak to False") == 2
    monkeypatch.setattr(loop, "sample_flops", lambda *_: (_ for _ in ()).throw(RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="something else"):
        loop.train(config, dataset=Folder(url=str(world / "dataset")), run=tmp_path / "other")


def test_where_nothing_is_measured_the_next_smaller_is_named(world: Path, parts: Parts) -> None:
    config = training_config(world)
    assert "set the phase's micro_batch to 4, or set denoiser" in advice(config, 0, parts, None)
    done = replace(
        config,
        denoiser=replace(config.denoiser, gradient_checkpointing=True, dtype="bfloat16"),
        phases=(replace(config.phases[0], micro_batch=1, latents="view"),),
    )
    assert advice(done, 0, parts, None).endswith(": take a device with more memory")


SCRIPT = """
import os, sys
from pathlib import Path
import torch
from pipeline.storage import Folder
from tests.training_fixtures import training_config
from training import loop, step
from training.processes import start_processes
losses_of, seen = step.losses_of, []
def failing(*given):
    seen.append(1)
    if os.environ["RANK"] == "1" and len(seen) == 2:
        raise torch.OutOfMemoryError("Tried to allocate 1.00 GiB.")
    return losses_of(*given)
step.losses_of = failing
if __name__ == "__main__":
    world = Path(sys.argv[1])
    try:
        loop.train(training_config(world), dataset=Folder(url=str(world / "dataset")), run=Path(sys.argv[2]))
    except MemoryError as error:
        sys.exit(f"densebridge: {error}")
"""


def test_the_others_do_not_wait_for_the_one_that_failed(world: Path, tmp_path: Path) -> None:
    """One of two processes runs out of memory while the other waits for its gradients."""
    script = tmp_path / "two.py"
    script.write_text(SCRIPT)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script), str(world)]
    settings: dict[str, Any] = {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    done = subprocess.run(
        [sys.executable, *command, str(tmp_path / "run")],
        env={**os.environ, **settings}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode not in (0, 75)
    assert done.stderr.count("densebridge: out of memory on cpu:0 in phase 'small' with micro_batch 6") == 1
