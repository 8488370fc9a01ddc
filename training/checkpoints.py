"""Checkpoints that a crash cannot spoil.

A checkpoint is a folder `checkpoint-<samples>`: the float32 weights of all that is trained, the optimizer's state by
parameter name, the average if there is one, and `checkpoint.json` with what made the run, the digest of each file and its
own. It is written aside, made durable and renamed whole; then old ones go. It does not know how many processes wrote it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from .bridge import Weights
from .fsdp import scattered
from .whole_files import digest_of, load_weights, publishing, restore_replaced, save_weights, write_json

FORMAT = 3
DIGEST = "sha256"
"""Field of checkpoint.json: the digest of all its others."""


@dataclass(kw_only=True)
class State:
    """How far a run has come. Counts are over all processes."""

    step: int = 0
    phase: int = 0
    position: int = 0
    """Committed samples of the phase."""
    samples: int = 0
    """Committed samples of the run."""
    skipped: int = 0
    """Steps skipped because something was not finite."""
    bad: int = 0
    """Samples that could not be used."""
    bad_run: int = 0
    """... of them the last ones, without one between that could."""
    average_from: int = 0
    """Step after which the average of the weights began."""
    seconds: float = 0.0
    """Spent training, over all sittings."""
    window: list[list[float]] | None = None
    """Loss by timestep bin since the last log line."""
    window_samples: int = 0
    window_seconds: float = 0.0
    validated: int = -1
    """Committed samples at the last validation; -1 where there was none."""
    held_out: str = ""
    """sha256 of the manifest of the view that validation reads; empty where it reads none."""
    scaler: dict[str, Any] = field(default_factory=dict)
    """Of the gradient scaler, in fp16."""


def tensors_of(module: nn.Module, optimizer: Any, ema: Weights | None) -> dict[str, Weights]:
    """The tensors of a checkpoint by file and name, as they lie on their device, in pieces or not; none is copied."""
    names = [name for name, _ in module.named_parameters()]
    state = optimizer.state_dict()["state"]
    moments = {f"{key}/{names[number]}": tensor for number, one in state.items() for key, tensor in one.items()}
    return {"trained": module.state_dict(), "optimizer": moments} | ({} if ema is None else {"ema": ema})


def write_checkpoint(
    run: Path, state: State, facts: dict[str, Any], tensors: Mapping[str, Weights], *, keep: int
) -> Path:
    """Writes `checkpoint-<samples>`, and once that is durable prunes to the newest `keep`.

    `tensors` are those of `tensors_of`, whole; `facts` is what a resumed run must agree with.
    """
    final = run / f"checkpoint-{state.samples:09d}"
    with publishing(final) as aside:
        for name, weights in tensors.items():
            save_weights(weights, aside / f"{name}.safetensors")
        files = {path.name: digest_of(path) for path in sorted(aside.iterdir())}
        told = {"format": FORMAT, "state": dataclasses.asdict(state), "facts": facts, "files": files}
        write_json(aside / "checkpoint.json", told | {DIGEST: _digest_of_json(told)})
    for old in _oldest_first(run)[:-keep]:
        gone = run / f".{old.name}.pruned"  # a crash leaves no half of it under its name
        old.rename(gone)
        shutil.rmtree(gone)
    return final


def latest_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None where it has none. Newer, damaged ones are renamed to `damaged-<name>` and
    said so. What a crash left half written goes, what it left half replaced comes back. Raises ValueError where there are
    checkpoints and none is whole.
    """
    restore_replaced(run)
    for leftover in (*run.glob(".checkpoint-*"), *run.glob(".release.*"), *run.glob(".best.*")):
        shutil.rmtree(leftover)
    damaged: dict[Path, str] = {}
    for path in reversed(_oldest_first(run)):
        problem = checkpoint_problem(path)
        if problem is None:
            for other, why in damaged.items():
                print(f"{other} is damaged ({why}): set aside, going on from {path.name}", flush=True)
                other.rename(run / f"damaged-{other.name}-{uuid.uuid4().hex[:6]}")
            return path
        damaged[path] = problem
    if damaged:
        told = "; ".join(f"{path.name}: {why}" for path, why in damaged.items())
        raise ValueError(f"no checkpoint in {run} is whole ({told}): copy one back, or remove the folder to train anew")
    return None


def _oldest_first(run: Path) -> list[Path]:
    return sorted(run.glob("checkpoint-*"), key=lambda path: int(path.name.removeprefix("checkpoint-")))


def checkpoint_problem(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        found = json.loads((path / "checkpoint.json").read_bytes())
        digest = found.pop(DIGEST, None)
        if digest is None and found["format"] != FORMAT:
            return None  # `restore` says that another version wrote it
        if digest != _digest_of_json(found):
            return "checkpoint.json has another digest"
        State(**found["state"])
        for name, digest in found["files"].items():
            if digest_of(path / name) != digest:
                return f"{name} has another digest"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _digest_of_json(value: dict[str, Any]) -> str:
    """sha256 of what a JSON value says, however it is laid out in a file."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def restore(path: Path, facts: dict[str, Any], module: nn.Module, optimizer: Any, ema: Weights | None) -> State:
    """Loads a checkpoint into what is trained, optimizer and average. Raises ValueError naming the first field that differs.

    Phases that have not begun may differ: a run can be lengthened by another phase.
    """
    found = json.loads((path / "checkpoint.json").read_bytes())
    if found["format"] != FORMAT:
        raise ValueError(f"{path} has format {found['format']}, this version reads {FORMAT}: start a new run folder")
    state = State(**found["state"])
    begun = state.phase + 1
    for one, other in zip(found["facts"]["phases"][:begun], facts["phases"][:begun], strict=False):
        then, now = one.get("views", {}), other.get("views", {})
        for view in sorted(then.keys() & now.keys()):
            if then[view]["manifest_sha256"] != now[view]["manifest_sha256"]:
                raise ValueError(
                    f"{path} cannot be resumed: view {view!r} has changed since: build it as it was, or remove "
                    f"{path.parent} to train anew"
                )
    check_same(
        {**found["facts"], "phases": found["facts"]["phases"][:begun]},
        {**facts, "phases": facts["phases"][:begun]},
        f"{path} cannot be resumed",
        "set it back, or start a new run folder",
    )
    load_weights(module, load_file(path / "trained.safetensors"), path / "trained.safetensors")
    _load_optimizer(module, optimizer, load_file(path / "optimizer.safetensors"))
    if ema is not None:
        for name, tensor in load_file(path / "ema.safetensors").items():
            ema[name].copy_(scattered(tensor, ema[name]))
    return state


def check_same(found: Any, expected: Any, what: str, advice: str, where: str = "") -> None:
    """Raises ValueError in one line at the first difference between two JSON values."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for name in sorted(set(found) | set(expected)):
            check_same(found.get(name), expected.get(name), what, advice, f"{where}.{name}" if where else name)
    elif isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            check_same(one, other, what, advice, f"{where}[{number}]")
    elif found != expected:
        raise ValueError(f"{what}: {where} is {found!r} there and {expected!r} here: {advice}")


def _load_optimizer(module: nn.Module, optimizer: Any, tensors: Weights) -> None:
    numbers = {name: (number, one) for number, (name, one) in enumerate(module.named_parameters())}
    state: dict[int, Weights] = {}
    for name, tensor in tensors.items():
        key, parameter = name.split("/", 1)
        number, like = numbers[parameter]
        # Moments lie as their parameter does; the count of steps is one number.
        state.setdefault(number, {})[key] = scattered(tensor, like) if tensor.shape == like.shape else tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
