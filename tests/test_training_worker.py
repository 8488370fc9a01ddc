"""A worker of a cluster without the cluster: what it says, hears and refuses."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest

from jobs import training_worker
from jobs.training_worker import WorkerTask, is_of_machines, work
from pipeline.secrets import VARIABLE
from pipeline.storage import Folder
from tests.training_fixtures import log_of, make_world, training_config
from training.checkpoints import latest_checkpoint


class Driver:
    """A driver that writes down what it is told, and asks to stop once it was told `until`, which it waits to be heard."""

    def __init__(self, until: str = "never") -> None:
        self.lines: list[str] = []
        self._until, self._asked, self._heard = until, threading.Event(), threading.Event()

    def say(self, lines: list[str]) -> None:
        self.lines += lines
        if any(self._until in line for line in lines):
            self._asked.set()
            self._heard.wait(10)

    def is_asked(self) -> bool:
        if self._asked.is_set():
            self._heard.set()
        return self._asked.is_set()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def first_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(training_worker, "_HEARS", 0.01)


def task(world: Path, run: Path, **settings: object) -> WorkerTask:
    run.mkdir(exist_ok=True)
    (run / "token").touch()
    config = training_config(world, log_every=1, **settings)
    dataset = Folder(url=str(world / "dataset"))
    return WorkerTask(config=config, dataset=dataset, run=run, token=run / "token", on_cpu=True)


def test_asked_to_stop_it_saves_says_so_and_goes_on(world: Path, tmp_path: Path) -> None:
    """In a thread, as Ray runs it: no signal reaches it there."""
    found: list[object] = []
    driver, after = Driver(until="12/84 samples"), Driver()
    for one in (driver, after):
        thread = threading.Thread(target=lambda one=one: found.append(work(task(world, tmp_path), one)))
        thread.start()
        thread.join()
    assert found[0] is None and "asked to stop: saved at" in driver.lines[-1]
    assert found[1].samples == 84 and any("going on from" in line for line in after.lines)  # type: ignore[attr-defined]
    assert len(log_of(tmp_path)) == 7


def test_a_run_folder_that_is_not_shared_is_refused(world: Path, tmp_path: Path) -> None:
    unseen = task(world, tmp_path / "runs")
    unseen.token.unlink()
    with pytest.raises(ValueError, match=r"does not see what the driver wrote to .*: set the recipe's runs to storage"):
        work(unseen, Driver())
    assert latest_checkpoint(unseen.run) is None


def test_secrets_that_are_not_there_are_one_line(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "none.env"))
    with pytest.raises(ValueError, match=r"none\.env") as caught:
        work(task(world, tmp_path / "run"), Driver())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConnectionResetError("cut"), ConnectionResetError),
        (TimeoutError("no answer"), TimeoutError),
        (OSError(errno.ESTALE, "Stale file handle"), OSError),
        (OSError(errno.ENOSPC, "No space left on device"), ValueError),
        (PermissionError(errno.EACCES, "Permission denied"), ValueError),
    ],
)
def test_what_is_of_machines_passes_and_what_is_of_users_is_a_line(
    error: OSError, kind: type[Exception], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(training_worker, "train", fails)
    with pytest.raises(kind) as caught:
        work(task(world, tmp_path / "run"), Driver())
    assert type(caught.value) is kind and is_of_machines(caught.value) == (kind is not ValueError)
