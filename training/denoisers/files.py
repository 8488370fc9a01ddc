"""What a diffusion model's files say and hold: the network's and the scheduler's settings, and the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from training.configuration import DenoiserConfig
from training.objective import NoiseLevels

NETWORKS = ("unet", "transformer")
"""Where a diffusers pipeline folder may hold its network."""
VAE = "vae"
"""Where it holds its VAE."""


def read_facts(config: DenoiserConfig, subfolder: str, name: str) -> dict[str, Any] | None:
    """A JSON file of the model's folder or hub repository; None where there is none."""
    if Path(config.model).is_dir():
        path = Path(config.model, subfolder, name)
        return json.loads(path.read_text()) if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return json.loads(
            Path(hf_hub_download(config.model, name, subfolder=subfolder, revision=config.revision)).read_text()
        )
    except EntryNotFoundError:
        return None


def network_facts(config: DenoiserConfig) -> dict[str, Any]:
    """The network's settings. Raises FileNotFoundError where there is no network."""
    for subfolder in NETWORKS:
        found = read_facts(config, subfolder, "config.json")
        if found is not None:
            return found
    raise FileNotFoundError(
        f"{config.model} holds neither {' nor '.join(f'{name}/config.json' for name in NETWORKS)}, or was never downloaded: "
        "name a diffusers pipeline"
    )


def load_network(config: DenoiserConfig, kind: str, subfolder: str) -> Any:
    """The network of this diffusers class with its weights, frozen, on the CPU. Raises OSError or ValueError in one line where
    they are not there, or not this network's.
    """
    import diffusers

    network_class = getattr(diffusers, kind)
    if config.single_file is not None:
        network = _from_single_file(config, Path(config.single_file), network_class, subfolder)
    else:
        network = network_class.from_pretrained(
            config.model,
            subfolder=subfolder,
            revision=config.revision,
            torch_dtype=getattr(torch, config.dtype),
            use_safetensors=True,
        )
    if config.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    return network.eval().requires_grad_(False)


def _from_single_file(config: DenoiserConfig, path: Path, network_class: Any, subfolder: str) -> Any:
    """The network of a community checkpoint, which is in Stable Diffusion's own layout or in that of SANA's authors.

    Only the network is taken. Its file may lack a VAE, and where it holds one that was tuned, that decodes the same latents;
    those that a view holds were made by the VAE that `model` names.
    """
    from diffusers.loaders.single_file_utils import SingleFileComponentError
    from safetensors import safe_open

    if not path.is_file():
        raise FileNotFoundError(f"denoiser.single_file {path} is not there: name a .safetensors file on this machine")
    if not hasattr(network_class, "from_single_file"):
        raise ValueError(
            f"denoiser.single_file is for U-Nets and SANA, {config.model} holds a {network_class.__name__}: leave it out"
        )
    try:
        network = network_class.from_single_file(
            str(path),
            config=config.model,
            subfolder=subfolder,
            config_revision=config.revision,
            torch_dtype=getattr(torch, config.dtype),
        )
    # A lacking weight is a KeyError, or stays on no device, which is a NotImplementedError when it is moved.
    except (OSError, ValueError, KeyError, NotImplementedError, SingleFileComponentError) as error:
        raise ValueError(
            f"denoiser.single_file {path} holds no {network_class.__name__} of the shape that {config.model} has: name its "
            "base model in denoiser.model"
        ) from error
    kind = scheduler_facts(config).get("prediction_type", "epsilon")
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
    if "v_pred" in names and kind != "v_prediction":  # an empty tensor, by which SDXL's single files say so
        raise ValueError(
            f"denoiser.single_file {path} predicts v_prediction, the scheduler of {config.model} says {kind}: name a model that "
            "predicts v_prediction in denoiser.model"
        )
    return network


def scheduler_facts(config: DenoiserConfig) -> dict[str, Any]:
    """The scheduler's settings. Raises FileNotFoundError where there are none."""
    found = read_facts(config, "scheduler", "scheduler_config.json")
    if found is None:
        raise FileNotFoundError(
            f"{config.model} holds no scheduler/scheduler_config.json, or was never downloaded: name a diffusers pipeline"
        )
    return found


def levels_of(facts: dict[str, Any], model: str) -> NoiseLevels:
    """The noise levels that a scheduler's settings tell of. Raises ValueError for a prediction type that is not known, and for
    levels that settings alone do not tell.

    Flows have levels (i + 1) / T, shifted towards noise as s x / (1 + (s - 1) x) (Esser et al. 2024, eq. 23).
    """
    if facts.get("use_dynamic_shifting"):
        raise ValueError(
            f"{model}: its scheduler shifts levels with the picture's size (use_dynamic_shifting): choose a model whose shift "
            "is one number"
        )
    if facts.get("prediction_type") == "flow_prediction" or str(facts.get("_class_name")).startswith("FlowMatch"):
        count = int(facts.get("num_train_timesteps", 1000))
        shift = float(facts.get("flow_shift") or facts.get("shift") or 1.0)
        even = torch.arange(1, count + 1, dtype=torch.float64) / count
        noise = shift * even / (1 + (shift - 1) * even)
        return NoiseLevels(
            kind="flow_prediction",
            signal=(1 - noise).float(),
            deviation=noise.float(),
            times=(noise * count).float(),
        )
    if not {"beta_schedule", "trained_betas", "beta_start", "beta_end"} & facts.keys():
        raise ValueError(
            f"{model}: its scheduler, {facts.get('_class_name')}, tells neither betas nor a flow: only epsilon, v_prediction "
            "and flow_prediction"
        )
    from diffusers import DDIMScheduler

    try:
        scheduler = DDIMScheduler.from_config(facts)
    except NotImplementedError:
        raise ValueError(
            f"{model}: its scheduler's beta_schedule {facts.get('beta_schedule')!r} is not known"
        ) from None
    kind = scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise ValueError(f"{model} predicts {kind}: only epsilon, v_prediction and flow_prediction")
    alphas = scheduler.alphas_cumprod.float()
    return NoiseLevels(
        kind=kind,
        signal=alphas.sqrt(),
        deviation=(1 - alphas).sqrt(),
        times=torch.arange(len(alphas), dtype=torch.float32),
    )
