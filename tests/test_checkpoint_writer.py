"""Checkpoints are written beside the steps, one at a time, as things were at their step, and said only once durable."""

from __future__ import annotations

import json
import resource
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.test_checkpoints import FACTS, stepped
from training import whole_files
from training.bridge import Bridge, Weights
from training.checkpoint_writer import CheckpointWriter
from training.checkpoints import State, checkpoint_problem, tensors_of


class Disk:
    """A disk that stands still until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.go = threading.Event(), threading.Event()
        sync = whole_files.sync

        def slow(path: Path) -> None:
            self.reached.set()
            assert self.go.wait(30)
            sync(path)

        monkeypatch.setattr(whole_files, "sync", slow)


def copies(module: Bridge, optimizer: torch.optim.Optimizer, ema: Weights) -> dict[str, Weights]:
    live = tensors_of(module, optimizer, ema)
    return {file: {name: tensor.clone() for name, tensor in weights.items()} for file, weights in live.items()}


def test_what_is_written_is_what_was_there_at_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, moments, averages and counts change while the disk is busy; nothing is said before it is done."""
    disk, said = Disk(monkeypatch), []
    module, optimizer = stepped(0)
    ema = {name: tensor.clone() + 1 for name, tensor in module.state_dict().items()}
    with CheckpointWriter(tmp_path, FACTS, keep=2, main=True, say=said.append) as writer:
        for samples in (12, 24):  # the second uses the buffers of the first again
            disk.go.clear()
            then, state = copies(module, optimizer, ema), State(samples=samples, window=[[0.5]])
            writer.save(state, module, optimizer, ema)
            assert disk.reached.wait(30)
            optimizer.step()
            for tensor in ema.values():
                tensor.mul_(2)
            state.samples, state.window[0][0] = 99, 9.0  # type: ignore[index]
            writer.check()
            path = tmp_path / f"checkpoint-{samples:09d}"
            assert not path.exists() and len(said) == samples // 12 - 1
            disk.go.set()
            writer.wait()
            assert said[-1] == f"{path.name} is on the disk" and checkpoint_problem(path) is None
            found = json.loads((path / "checkpoint.json").read_text())["state"]
            assert found["samples"] == samples and found["window"] == [[0.5]]
            for file, weights in then.items():
                on_disk = load_file(path / f"{file}.safetensors")
                assert on_disk.keys() == weights.keys()
                assert all(torch.equal(on_disk[name], tensor) for name, tensor in weights.items())


def test_never_two_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, said = Disk(monkeypatch), []
    module, optimizer = stepped(0)
    with CheckpointWriter(tmp_path, FACTS, keep=2, main=True, say=said.append) as writer:
        writer.save(State(samples=1), module, optimizer, None)
        assert disk.reached.wait(30)
        wait = writer.wait
        monkeypatch.setattr(writer, "wait", lambda: (disk.go.set(), wait()))  # it was late when it began to wait
        writer.save(State(samples=2), module, optimizer, None)
        assert said[0] == "checkpoint-000000001 is on the disk"
        assert said[1].startswith("the step waited ") and said[1].endswith(" s until the checkpoint before was written")
    assert said[2:] == ["checkpoint-000000002 is on the disk"]  # leaving waits


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file may grow beyond `size`: what the system says then is as for a full disk."""
    former, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_told_at_the_next_step_and_loses_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    module, optimizer = stepped(0)
    with CheckpointWriter(tmp_path, FACTS, keep=2, main=True, say=said.append) as writer:
        for samples in (1, 2):
            writer.save(State(samples=samples), module, optimizer, None)
        writer.wait()
        with full_disk(10_000):
            writer.save(State(samples=3), module, optimizer, None)
            with pytest.raises(
                OSError, match=r"^the checkpoint at 3 samples could not be written \(.*too large.*make room"
            ):
                while True:
                    writer.check()
        writer.check()  # told once
        whole = [tmp_path / f"checkpoint-00000000{samples}" for samples in (1, 2)]
        assert sorted(tmp_path.iterdir()) == whole and all(checkpoint_problem(path) is None for path in whole)
        writer.save(State(samples=4), module, optimizer, None)
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["2", "4"]


def test_a_failure_does_not_hide_what_ended_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(whole_files, "sync", lambda path: (_ for _ in ()).throw(OSError("disk gone")))
    writer = CheckpointWriter(tmp_path, FACTS, keep=2, main=True, say=said.append)
    with pytest.raises(FloatingPointError), writer:
        writer.save(State(samples=1), *stepped(0), None)
        raise FloatingPointError
    assert len(said) == 1 and "could not be written (disk gone)" in said[0]
    writer = CheckpointWriter(tmp_path, FACTS, keep=2, main=True, say=said.append)
    with pytest.raises(OSError, match="disk gone"), writer:
        writer.save(State(samples=1), *stepped(0), None)


def test_what_was_begun_anew_is_not_saved_from_before(tmp_path: Path) -> None:
    """A phase that forgets the moments, and whose first step is skipped, has none to save."""
    module, optimizer = stepped(0)
    with CheckpointWriter(tmp_path, FACTS, keep=2, main=True) as writer:
        writer.save(State(samples=1), module, optimizer, None)
        optimizer.state.clear()
        writer.save(State(samples=2), module, optimizer, None)
    before, after = (load_file(tmp_path / f"checkpoint-00000000{n}" / "optimizer.safetensors") for n in (1, 2))
    assert before and not after


def test_a_failure_is_told_after_the_wait_for_it_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, said = Disk(monkeypatch), []
    result = Future.result

    def interrupted(future: Future[Path]) -> Path:
        monkeypatch.setattr(Future, "result", result)
        raise KeyboardInterrupt

    with (
        pytest.raises(KeyboardInterrupt),
        CheckpointWriter(tmp_path, FACTS, keep=2, main=True, say=said.append) as writer,
    ):
        writer.save(State(samples=1), *stepped(0), None)
        assert disk.reached.wait(30)
        monkeypatch.setattr(Future, "result", interrupted)
        try:
            writer.wait()
        finally:
            disk.go.set()
    assert said == ["checkpoint-000000001 is on the disk"]


def test_other_processes_copy_and_write_nothing(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, FACTS, keep=2, main=False) as writer:
        writer.save(State(samples=1), *stepped(0), None)
        writer.check()
        assert not any(writer._buffers.values())
    assert not list(tmp_path.iterdir())
