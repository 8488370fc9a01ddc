"""Samplers: the diffusers schedulers that draw, each made from the denoiser's own scheduler settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch

from pipeline.spelling import nearest

from .configuration import Sampler
from .denoisers import Denoiser
from .objective import rng

FLOW = ("auto", "euler", "dpm++", "unipc")
"""Those that can follow a flow."""
STOCHASTIC = ("euler_a", "ddpm")
"""Those that add noise at every step."""


def scheduler_of(denoiser: Denoiser, sampler: Sampler = "auto") -> Any:
    """A fresh diffusers scheduler over the denoiser's noise levels. Raises ValueError for a sampler that is not known or
    cannot follow a flow.
    """
    import diffusers

    if sampler not in get_args(Sampler):
        raise ValueError(f"there is no sampler {sampler!r}: {nearest(sampler, get_args(Sampler))}")
    facts = denoiser.scheduler
    if denoiser.prediction_type == "flow_prediction":
        if sampler not in FLOW:
            raise ValueError(f"sampler {sampler!r} cannot draw with a flow: choose {', '.join(FLOW)}")
        shift = float(facts.get("flow_shift") or facts.get("shift") or 1.0)
        count = int(facts.get("num_train_timesteps", 1000))
        flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
        match sampler:
            case "dpm++":
                return diffusers.DPMSolverMultistepScheduler(num_train_timesteps=count, **flow)
            case "unipc":
                return diffusers.UniPCMultistepScheduler(num_train_timesteps=count, **flow)
            case _:
                return diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=count, shift=shift)
    # Latents are not bounded as pixels are; a scheduler that was stored as another class may not say so.
    kinds = {
        "auto": diffusers.DDIMScheduler,
        "ddim": diffusers.DDIMScheduler,
        "ddpm": diffusers.DDPMScheduler,
        "dpm++": diffusers.DPMSolverMultistepScheduler,
        "unipc": diffusers.UniPCMultistepScheduler,
        "euler": diffusers.EulerDiscreteScheduler,
        "euler_a": diffusers.EulerAncestralDiscreteScheduler,
    }
    # A base may come with DPM-Solver's stochastic kind, whose noise would not be by the picture's seed.
    forced = {"algorithm_type": "dpmsolver++"} if sampler == "dpm++" else {}
    return kinds[sampler].from_config({"clip_sample": False, **facts, **forced})


def set_steps(scheduler: Any, steps: int, device: torch.device) -> torch.Tensor:
    """Sets so many steps; their timesteps, from noise to none. Of a flow they are even before its shift: left to itself
    diffusers' Euler shifts its ends twice, and of four steps the last would clear half of the noise.
    """
    import diffusers

    if isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        scheduler.set_timesteps(sigmas=[1 - step / steps for step in range(steps)], device=device)
    else:
        scheduler.set_timesteps(steps, device=device)
    return scheduler.timesteps


def step_settings(sampler: Sampler, seeds: Sequence[int]) -> dict[str, Any]:
    """What a scheduler's `step` is given besides the prediction: for stochastic samplers a generator for each picture, so that
    its noise depends on its seed alone.
    """
    if sampler not in STOCHASTIC:
        return {}
    states = [int(rng(seed, 0, 0, "sampler").integers(2**63)) for seed in seeds]
    return {"generator": [torch.Generator().manual_seed(state) for state in states]}
