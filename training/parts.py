"""What a run is put together from: processes, views, frozen models, connector, optimizer. What is wrong shows here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipeline.fingerprint import plain
from pipeline.shards import View
from pipeline.storage import Folder

from .batches import BatchConfig, batch_problem, check_images
from .checkpoints import Weights
from .configuration import TrainingConfig
from .connectors import build_connector
from .denoisers import Denoiser, check_latents
from .language_models import LanguageModel, check_view

# What may change between two sittings of a run without changing its result.
_FREE = ("checkpoint_every", "keep_checkpoints", "log_every", "skip_budget", "bad_share", "threads", "ahead")
_APART = ("connector", "language_model", "denoiser", "phases")


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The models of a run, on this process's device."""

    accelerator: Any
    """accelerate's `Accelerator`; only `loop` imports that library."""
    language_model: LanguageModel
    denoiser: Denoiser
    module: nn.Module
    """The connector itself."""
    wrapped: nn.Module
    """The connector as accelerate calls it: its gradients are averaged over processes."""
    optimizer: Any
    ema: Weights | None
    """The average of the connector's weights."""
    empty_ids: tuple[int, ...]
    """Token ids of the empty prompt."""


def open_views(config: TrainingConfig, dataset: Folder) -> list[View]:
    """Each phase's view, checked to hold what the configuration wants. Raises ValueError or FileNotFoundError."""
    views = [View.open(dataset, phase.view) for phase in config.phases]
    for view, phase in zip(views, config.phases, strict=True):
        check_view(config.language_model, view.info)
        check_images(view, phase.resolution)
        check_latents(config.denoiser, phase, view.info)
    return views


def check_before(config: TrainingConfig, dataset: Folder, processes: int) -> None:
    """What needs no model: batches that divide, and the views. Raises as `open_views` does."""
    for phase in config.phases:
        micro_batch = phase.micro_batch_of(processes)
        if phase.batch % (processes * micro_batch):
            raise ValueError(batch_problem(phase.batch, processes, micro_batch))
    open_views(config, dataset)


def load_parts(config: TrainingConfig, accelerator: Any) -> Parts:
    """The models and the optimizer, on this process's device. Raises ValueError where widths do not fit."""
    language_model = config.language_model.load().to(accelerator.device)
    encodes = any(phase.latents == "off" for phase in config.phases)
    denoiser = config.denoiser.load(with_vae=encodes).to(accelerator.device)
    for name, wanted, given in (
        ("in_width", language_model.width, config.connector.in_width),
        ("width", denoiser.width, config.connector.width),
    ):
        if wanted != given:
            raise ValueError(f"connector.{name} is {given}, the models here want {wanted}: set it to {wanted}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        module = build_connector(config.connector)
    optimizer = torch.optim.AdamW(module.parameters(), betas=config.betas, weight_decay=config.weight_decay)
    wrapped, prepared = accelerator.prepare(module, optimizer)
    module = accelerator.unwrap_model(wrapped)
    ema = None
    if config.ema_decay is not None:
        ema = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    return Parts(
        accelerator=accelerator,
        language_model=language_model,
        denoiser=denoiser,
        module=module,
        wrapped=wrapped,
        optimizer=prepared,
        ema=ema,
        empty_ids=tuple(language_model.tokenize([""])[0].tolist()),
    )


def batch_config(config: TrainingConfig, number: int, parts: Parts) -> BatchConfig:
    """How this process reads its share of phase `number`."""
    phase = config.phases[number]
    return BatchConfig(
        seed=config.seed,
        phase=number,
        resolution=phase.resolution,
        batch=phase.batch,
        micro_batch=phase.micro_batch_of(parts.accelerator.num_processes),
        latent_shape=parts.denoiser.latent_shape(phase.resolution),
        steps=parts.denoiser.steps,
        tokenizer=config.language_model.tokenizer,
        empty_ids=parts.empty_ids,
        caption_drop=config.caption_drop,
        crop=config.crop,
        drawn_latents=parts.denoiser.vae_facts.is_drawn,
        latents=phase.latents,
        timesteps=config.timesteps,
        rank=parts.accelerator.process_index,
        world=parts.accelerator.num_processes,
        threads=config.threads,
        ahead=config.ahead,
    )


def facts_of(config: TrainingConfig, views: list[View], parts: Parts) -> dict[str, Any]:
    """Everything that a resumed run must agree with."""
    settings = plain(config, frozenset((*_FREE, *_APART)))
    phases = []
    for phase, view in zip(config.phases, views, strict=True):
        captions = view.info.tokenizers[config.language_model.tokenizer]["captions"]
        of_view = {"manifest_sha256": view.info.manifest_sha256, "captions": captions}
        phases.append(plain(phase, frozenset(["micro_batch"])) | of_view)
    return {
        "training": settings | {"denoiser_dtype": config.denoiser.dtype},
        "connector": plain(config.connector),
        "language_model": parts.language_model.identity(),
        "denoiser": parts.denoiser.identity(),
        "phases": phases,
    }
