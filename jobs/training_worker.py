"""One worker of a training on a cluster: what it makes sure of, and how it hears from the driver and speaks to it."""

from __future__ import annotations

import errno
import io
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from pipeline.secrets import read_secrets
from pipeline.storage import Folder
from training.configuration import TrainingConfig
from training.loop import TrainingResult, train
from training.processes import INTERRUPTED

from .cli import USER_ERRORS, one_line

_HEARS = 1.0  # seconds between two questions to the driver


@dataclass(frozen=True, kw_only=True)
class WorkerTask:
    """What every worker is told."""

    config: TrainingConfig
    dataset: Folder
    run: Path
    """The run folder, on storage that all nodes share."""
    token: Path
    """A file in `run` that the driver has written: a worker that does not see it does not share the folder."""
    on_cpu: bool


class Link(Protocol):
    """What a worker has of the driver. Calls keep their order."""

    def say(self, lines: list[str]) -> None:
        """Has the lines shown."""

    def is_asked(self) -> bool:
        """Whether the driver was asked to stop. Waits for the answer."""


def work(task: WorkerTask, link: Link) -> TrainingResult | None:
    """Trains as one of the processes that RANK and its kin tell of; in any thread. None: asked to stop, and saved.

    Raises ValueError in one line for all that a user can do something about: other classes may not survive the way. What
    `is_of_machines` passes as it is.
    """
    if task.on_cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    with _listening(link) as asked, _speaking(link) if os.environ["RANK"] == "0" else nullcontext():
        try:
            read_secrets()
            if not task.token.is_file():
                raise ValueError(
                    f"node {socket.gethostname()} does not see what the driver wrote to {task.run}: set the recipe's runs "
                    "to storage that all nodes share"
                )
            return train(task.config, dataset=task.dataset, run=task.run, asked=asked)
        except (*USER_ERRORS, OSError) as error:
            if is_of_machines(error):
                raise
            raise ValueError(one_line(error)) from error
        except SystemExit as end:
            if end.code != INTERRUPTED:
                raise
            return None


def is_of_machines(error: BaseException) -> bool:
    """Whether a process ended because another one, a device or a connection is gone: started again, it may go on."""
    if isinstance(error, torch.distributed.DistError | torch.AcceleratorError | ConnectionError | TimeoutError):
        return True
    if isinstance(error, OSError):
        return error.errno in (errno.ESTALE, errno.EIO, errno.ENETUNREACH)
    return isinstance(error, RuntimeError) and "gloo/transport" in str(error)


@contextmanager
def _listening(link: Link) -> Iterator[threading.Event]:
    """An event that is set once the driver is asked to stop: signals come to it alone."""
    asked, ended = threading.Event(), threading.Event()

    def listen() -> None:
        while not (asked.is_set() or ended.wait(_HEARS)):
            if link.is_asked():
                asked.set()

    threading.Thread(target=listen, daemon=True).start()
    try:
        yield asked
    finally:
        ended.set()


@contextmanager
def _speaking(link: Link) -> Iterator[None]:
    """What is printed meanwhile is said to the driver."""
    with redirect_stdout(_Lines(link)):
        try:
            yield
        finally:
            link.is_asked()  # once this is answered the last lines have arrived, and the process may end


class _Lines(io.TextIOBase):
    """Standard output that goes to the driver by whole lines."""

    def __init__(self, link: Link) -> None:
        self._link, self._begun = link, ""

    def write(self, text: str) -> int:
        *whole, self._begun = (self._begun + text).split("\n")
        if whole:
            self._link.say(whole)
        return len(text)
