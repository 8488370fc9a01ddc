"""The release of a run, which generation loads.

A folder `release`: a file for each part of the bridge (`connector.safetensors`, `pool.safetensors`,
`denoiser_lora.safetensors`, …; their averages as `ema.<part>.safetensors`), and `connector.json` that says what they need
and how they were trained.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file

from .bridge import Bridge, Weights, from_parts, parts_of
from .checkpoints import FORMAT, State, check_same
from .connectors import connector_config
from .denoisers import Denoiser
from .language_models import LanguageModel
from .whole_files import digest_of, load_weights, publishing, save_weights, write_json


def write_release(
    run: Path,
    facts: dict[str, Any],
    state: State,
    trained: Weights,
    ema: Weights | None,
    *,
    name: str = "release",
    validation: dict[str, Any] | None = None,
) -> Path:
    """Writes the folder `name`: the weights for others, and `connector.json` that says what they need and how they were trained.
    `trained` is the bridge's state dict, `facts` are those of `facts_of`, `validation` what validation says of these weights.
    Returns the folder.
    """
    with publishing(run / name) as aside:
        for prefix, weights in (("", trained), ("ema.", ema or {})):
            for part, tensors in parts_of(weights).items():
                save_weights(tensors, aside / f"{prefix}{part}.safetensors")
        files = {path.name: digest_of(path) for path in sorted(aside.iterdir())}
        parts = ("connector", "language_model", "denoiser", "beside", "training", "phases")
        known = {part: facts[part] for part in parts} | ({"validation": validation} if validation else {})
        write_json(aside / "connector.json", {"format": FORMAT, "samples": state.samples, **known, "files": files})
    return run / name


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
        if not (folder / name).is_file() or digest_of(folder / name) != digest:
            raise ValueError(f"{folder / name} is damaged (its digest is not the one in connector.json): copy it again")
        parts[name.removeprefix("ema.").removesuffix(".safetensors")] = load_file(folder / name)
    return parts
