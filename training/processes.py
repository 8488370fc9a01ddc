"""The processes of a run: how they find each other, and how they are asked to stop."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch

from .configuration import TrainingConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

_T = TypeVar("_T")
INTERRUPTED = 75
"""Exit code after SIGTERM or SIGUSR1: saved, to be started again (EX_TEMPFAIL)."""


def start_processes(config: TrainingConfig) -> Accelerator:
    """Joins the processes that torchrun or accelerate started. Raises ValueError where that cannot work."""
    from accelerate import Accelerator

    if config.precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("training.precision is 'fp16', which needs a GPU: use 'no' or 'bf16'")
    accelerator = Accelerator(mixed_precision=config.precision)
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != wanted:
        raise ValueError(
            f"{wanted} processes were started and accelerate sees {accelerator.num_processes}: on CPUs set "
            "ACCELERATE_USE_CPU=true"
        )
    return accelerator


def agreed(value: _T) -> _T:
    """What the main process says, on all of them; each must ask."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def gathered(items: list[_T]) -> list[_T]:
    """The items of all processes, on all of them; each must ask."""
    from accelerate.utils import gather_object

    return gather_object(items)


@contextmanager
def stop_signals(asked: threading.Event | None = None) -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGUSR1 set, as batch systems send them; the former handlers come back afterwards.

    In a thread no signal can be handled: who starts a run in one gives the event, and sets it.
    """
    asked = asked or threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    former = {number: signal.signal(number, lambda *_: asked.set()) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield asked
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
