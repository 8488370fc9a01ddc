"""Checkpoints that a crash cannot spoil, and the release that generation loads.

A checkpoint is a folder `checkpoint-<samples>`: the float32 weights of all that is trained, the optimizer's state by
parameter name, the average if there is one, and `checkpoint.json` with the digest of each file and what made the run. It
is written aside, made durable and renamed whole; then old ones go. It does not know how many processes wrote it.

A release is a folder `release`: a file for each part of the bridge (`connector.safetensors`, `pool.safetensors`,
`denoiser_lora.safetensors`, …; their averages as `ema.<part>.safetensors`), and `connector.json` that says what they need
and how they were trained.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file, save_file
from torch import nn

from .bridge import Bridge, Weights, from_parts, parts_of
from .connectors import connector_config
from .denoisers import Denoiser
from .language_models import LanguageModel

FORMAT = 2


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
    seconds: float = 0.0
    """Spent training, over all sittings."""
    window: list[list[float]] | None = None
    """Loss by timestep bin since the last log line."""
    window_samples: int = 0
    window_seconds: float = 0.0
    scaler: dict[str, Any] = field(default_factory=dict)
    """Of the gradient scaler, in fp16."""


def save_checkpoint(
    run: Path, state: State, facts: dict[str, Any], module: nn.Module, optimizer: Any, ema: Weights | None, keep: int
) -> Path:
    """Writes `checkpoint-<samples>` and prunes to the newest `keep`; `facts` is what a resumed run must agree with."""
    final = run / f"checkpoint-{state.samples:09d}"
    with publishing(final) as aside:
        save_weights(module.state_dict(), aside / "trained.safetensors")
        save_file(_optimizer_tensors(module, optimizer), aside / "optimizer.safetensors")
        if ema is not None:
            save_weights(ema, aside / "ema.safetensors")
        files = {path.name: _digest(path) for path in sorted(aside.iterdir())}
        _write_json(
            aside / "checkpoint.json",
            {"format": FORMAT, "state": dataclasses.asdict(state), "facts": facts, "files": files},
        )
    for old in _oldest_first(run)[:-keep]:
        shutil.rmtree(old)
    return final


def latest_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None. Damaged ones are renamed to `damaged-<name>` and said so.

    What a crash left half written goes.
    """
    for leftover in (*run.glob(".checkpoint-*"), *run.glob(".old-*"), *run.glob(".release.*")):
        shutil.rmtree(leftover)
    for path in reversed(_oldest_first(run)):
        problem = checkpoint_problem(path)
        if problem is None:
            return path
        print(f"{path} is damaged ({problem}): set aside, going on from the one before", flush=True)
        path.rename(run / f"damaged-{path.name}-{uuid.uuid4().hex[:6]}")
    return None


def _oldest_first(run: Path) -> list[Path]:
    return sorted(run.glob("checkpoint-*"), key=lambda path: int(path.name.removeprefix("checkpoint-")))


def checkpoint_problem(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        files = json.loads((path / "checkpoint.json").read_bytes())["files"]
        for name, digest in files.items():
            if _digest(path / name) != digest:
                return f"{name} has another digest"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


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
            ema[name].copy_(tensor)
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
    module.load_state_dict(weights)


def write_release(run: Path, facts: dict[str, Any], state: State, bridge: Bridge, ema: Weights | None) -> Path:
    """Writes `release/`: the weights for others, and `connector.json` that says what they need and how they were trained.
    `facts` are those of `facts_of`. Returns the folder.
    """
    with publishing(run / "release") as aside:
        for prefix, weights in (("", bridge.state_dict()), ("ema.", ema or {})):
            for part, tensors in parts_of(weights).items():
                save_weights(tensors, aside / f"{prefix}{part}.safetensors")
        files = {path.name: _digest(path) for path in sorted(aside.iterdir())}
        parts = ("connector", "language_model", "denoiser", "beside", "training", "phases")
        known = {name: facts[name] for name in parts}
        _write_json(aside / "connector.json", {"format": FORMAT, "samples": state.samples, **known, "files": files})
    return run / "release"


def read_release(folder: Path | str) -> dict[str, Any]:
    """What a release's connector.json says. Raises FileNotFoundError or ValueError in one line."""
    folder = Path(folder)
    if not (folder / "connector.json").is_file():
        raise FileNotFoundError(f"{folder} holds no connector.json: name the `release` folder of a finished run")
    facts = json.loads((folder / "connector.json").read_bytes())
    if facts["format"] != FORMAT:
        raise ValueError(f"{folder} has format {facts['format']}, this version reads {FORMAT}")
    return facts


def load_bridge(
    folder: Path | str,
    *,
    language_model: LanguageModel,
    denoiser: Denoiser,
    beside: LanguageModel | None = None,
    weights: Literal["auto", "last", "ema"] = "auto",
    check: Literal["all", "connector"] = "all",
) -> Bridge:
    """A released bridge, frozen, on the CPU, its LoRA loaded into the two models; "auto" takes the averages where there are.

    Raises ValueError naming the field in which a model is not the one it was trained with. `check` "connector" leaves that
    out, as for another model of the same family: then only shapes must fit.
    """
    folder, facts = Path(folder), read_release(folder)
    if check == "all":
        for name, part in (("language_model", language_model), ("denoiser", denoiser), ("beside", beside)):
            found = part.identity() if part else None
            check_same(facts[name], found, f"{folder} does not fit", "use the one it was trained with", name)
    bridge = Bridge(
        connector_config(facts["connector"]), language_model_lora=language_model.lora, denoiser_lora=denoiser.lora
    )
    load_weights(bridge, from_parts(release_parts(folder, facts, weights)), folder)
    return bridge.eval().requires_grad_(False)


def release_parts(
    folder: Path, facts: dict[str, Any], weights: Literal["auto", "last", "ema"] = "auto"
) -> dict[str, Weights]:
    """The weights of a release by part; `facts` are those of `read_release`, "auto" takes the averages where there are.

    Raises FileNotFoundError where there are none, ValueError naming a file that is damaged.
    """
    averaged = any(name.startswith("ema.") for name in facts["files"])
    prefix = "ema." if weights == "ema" or (weights == "auto" and averaged) else ""
    if prefix and not averaged:
        raise FileNotFoundError(f"{folder} holds no averages (ema): choose other weights")
    parts: dict[str, Weights] = {}
    for name, digest in facts["files"].items():
        if name.startswith("ema.") != bool(prefix):
            continue
        if not (folder / name).is_file() or _digest(folder / name) != digest:
            raise ValueError(f"{folder / name} is damaged (its digest is not the one in connector.json): copy it again")
        parts[name.removeprefix("ema.").removesuffix(".safetensors")] = load_file(folder / name)
    return parts


def _optimizer_tensors(module: nn.Module, optimizer: Any) -> Weights:
    state, names = optimizer.state_dict()["state"], [name for name, _ in module.named_parameters()]
    return {f"{key}/{names[number]}": tensor.cpu() for number, one in state.items() for key, tensor in one.items()}


def _load_optimizer(module: nn.Module, optimizer: Any, tensors: Weights) -> None:
    numbers = {name: number for number, (name, _) in enumerate(module.named_parameters())}
    state: dict[int, Weights] = {}
    for name, tensor in tensors.items():
        key, parameter = name.split("/", 1)
        state.setdefault(numbers[parameter], {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


@contextmanager
def publishing(final: Path) -> Iterator[Path]:
    """A hidden folder to write to; it appears as `final` whole and durable when the block ends, or not at all."""
    aside = final.parent / f".{final.name}.{uuid.uuid4().hex[:8]}"
    aside.mkdir(parents=True)
    try:
        yield aside
        for path in (*aside.iterdir(), aside):
            _sync(path)
        replaced = final.parent / f".old-{final.name}.{uuid.uuid4().hex[:8]}"
        if final.exists():
            final.rename(replaced)
        aside.rename(final)
        _sync(final.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


def _digest(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
