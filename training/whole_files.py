"""Named tensors in safetensors files, and folders that appear whole and durable or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from .bridge import Weights
from .fsdp import scattered


def save_weights(weights: Weights, path: Path) -> None:
    """Writes named tensors as they are to a safetensors file; the TSC's names are those of ELLA's release."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, path)


def load_weights(module: nn.Module, weights: Weights, path: Path) -> None:
    """Loads named tensors of any float dtype into a module. Raises ValueError naming a tensor that is off; `path` is where
    they are from.
    """
    own = module.state_dict()
    for name in sorted(set(weights) | set(own)):
        if name not in weights or name not in own:
            raise ValueError(f"{path}: {name} is {'missing' if name in own else 'not known'}: is it another connector?")
        if weights[name].shape != own[name].shape:
            raise ValueError(
                f"{path}: {name} has shape {list(weights[name].shape)}, the connector {list(own[name].shape)}: "
                "check width, queries and in_width"
            )
    module.load_state_dict({name: scattered(weights[name], like) for name, like in own.items()})


@contextmanager
def publishing(final: Path) -> Iterator[Path]:
    """A hidden folder to write to; it appears as `final` whole and durable when the block ends, or not at all.

    What stood there before stays until then. Between two renames neither stands there: where a process dies just then,
    `restore_replaced` brings the former one back.
    """
    aside = final.parent / f".{final.name}.{uuid.uuid4().hex[:8]}"
    aside.mkdir(parents=True)
    try:
        yield aside
        for path in (*aside.iterdir(), aside):
            sync(path)
        replaced = final.parent / f".old-{final.name}.{uuid.uuid4().hex[:8]}"
        if final.exists():
            final.rename(replaced)
        aside.rename(final)
        sync(final.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def restore_replaced(parent: Path) -> None:
    """Clears up after processes that died in `publishing` folders of `parent`: what they were about to replace stands under
    its name again, unless what replaces it does.
    """
    for former in parent.glob(".old-*"):
        final = parent / former.name.removeprefix(".old-").rpartition(".")[0]
        if final.exists():
            shutil.rmtree(former)
        else:
            former.rename(final)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a folder to this process, as far as its disk knows locks. Raises ValueError where another one has it."""
    with (folder / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder} is another training's that still runs: wait for its end, or stop it") from None
        except OSError:  # a network's disk may have no locks
            pass
        yield


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON, for people too."""
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


def digest_of(path: Path) -> str:
    """sha256 of a file, as hex."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Returns when a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
