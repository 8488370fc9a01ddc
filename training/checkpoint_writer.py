"""Checkpoints written beside the steps: a step waits for the copy into host memory alone."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .bridge import Weights
from .checkpoints import State, tensors_of, write_checkpoint
from .fsdp import whole


class CheckpointWriter:
    """A thread that writes one checkpoint at a time; leaving the context waits for it. Only where the next one falls due while
    it still writes, which is said, do steps wait for the disk.

    Every process saves at the same steps, as a tensor in pieces takes all of them to be put together. Only the main process
    copies and writes; the others wait for nothing.
    """

    def __init__(
        self, run: Path, facts: dict[str, Any], *, keep: int, main: bool, say: Callable[[str], None] = print
    ) -> None:
        """`facts` and `keep` are those of `write_checkpoint`; `say` hears of each checkpoint once it is durable."""
        self._run, self._facts, self._keep, self._main, self._say = run, facts, keep, main, say
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: tuple[str, Future[Path]] | None = None
        self._buffers: dict[str, Weights] = {}

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self.wait()
        except OSError as error:
            if kind is None:
                raise
            self._say(str(error))  # what ended the run is told by whoever catches it
        finally:
            self._thread.shutdown()

    def save(self, state: State, module: nn.Module, optimizer: Any, ema: Weights | None) -> None:
        """Copies everything as it is now and has it written.

        Where the checkpoint before is still being written, waits for it and says how long. Raises OSError where that failed.
        """
        began, is_late = time.monotonic(), self._writing is not None and not self._writing[1].done()
        self.wait()
        if is_late:
            self._say(f"the step waited {time.monotonic() - began:.1f} s until the checkpoint before was written")
        tensors, frozen = self._copied(tensors_of(module, optimizer, ema)), copy.deepcopy(state)
        if self._main:
            written = self._thread.submit(write_checkpoint, self._run, frozen, self._facts, tensors, keep=self._keep)
            self._writing = f"checkpoint at {state.samples:,} samples", written

    def check(self) -> None:
        """Says so where a checkpoint became durable since the last call. Raises OSError in one line where it failed."""
        if self._writing is not None and self._writing[1].done():
            self.wait()

    def wait(self) -> None:
        """Returns when the last checkpoint is durable. Raises OSError in one line where it could not be written."""
        if self._writing is None:
            return
        what, written = self._writing
        try:
            path = written.result()
        except Exception as error:  # safetensors has its own for a full disk
            raise OSError(
                f"the {what} could not be written ({' '.join(str(error).split())}): those before it are whole; make room "
                f"in {self._run}, the same command goes on from them"
            ) from error
        finally:
            if written.done():  # else Ctrl-C: leaving the context waits and tells
                self._writing = None
        self._say(f"{path.name} is on the disk")

    def _copied(self, tensors: Mapping[str, Weights]) -> dict[str, Weights]:
        """Copies in host memory, which are used again by the next checkpoint; pinned, where they come from a GPU. Of the main
        process: the others have none.
        """
        copies: dict[str, Weights] = {file: {} for file in tensors}
        devices: set[torch.device] = set()
        for file, weights in tensors.items():
            buffers = self._buffers.setdefault(file, {})
            for name, piece in weights.items():
                tensor = whole(piece.detach())
                if not self._main:
                    continue
                if name not in buffers:
                    buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                buffers[name].copy_(tensor, non_blocking=True)
                copies[file][name] = buffers[name]
                devices.add(tensor.device)
        for device in devices:
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
        return copies
