"""What a run is put together from: processes, views, frozen models, connector, optimizer. What is wrong shows here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipeline.fingerprint import plain
from pipeline.shards import View

from .batches import BatchConfig
from .bridge import Bridge, Weights
from .configuration import TrainingConfig
from .connectors import ConnectorConfig
from .denoisers import Denoiser
from .fsdp import spread
from .language_models import LanguageModel
from .speed import lay_out, set_kernels

# What may change between two sittings of a run without changing its result.
_FREE = (
    *("checkpoint_every", "keep_checkpoints", "log_every", "trackers", "measure_peak", "validation"),
    *("skip_budget", "bad_share", "bad_in_a_row", "threads", "ahead", "cache", "cache_gib", "fsdp", "speed"),
)
_APART = ("connector", "language_model", "denoiser", "beside", "phases")


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The models of a run, on this process's device."""

    accelerator: Any
    """accelerate's `Accelerator`; only `processes` imports that library."""
    language_model: LanguageModel
    denoiser: Denoiser
    beside: LanguageModel | None
    """The denoiser's own text encoder, where its tokens stand behind the connector's."""
    bridge: Bridge
    """All that is trained."""
    wrapped: nn.Module
    """The bridge as accelerate calls it: its gradients are averaged over processes."""
    optimizer: Any
    ema: Weights | None
    """The average of the bridge's weights."""
    empty_ids: tuple[int, ...]
    """Token ids of the empty prompt."""
    beside_empty_ids: tuple[int, ...]
    """... and for `beside`."""


def load_parts(config: TrainingConfig, accelerator: Any) -> Parts:
    """The models and the optimizer, on this process's device. Raises ValueError where widths do not fit."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # a LoRA starts at random, inside its model
        language_model = config.language_model.load().to(accelerator.device)
        encodes = any(phase.latents == "off" for phase in config.phases)
        denoiser = config.denoiser.load(with_vae=encodes).to(accelerator.device)
    beside = config.beside.load().to(accelerator.device) if config.beside else None
    return assemble(config, accelerator, language_model, denoiser, beside)


def assemble(
    config: TrainingConfig,
    accelerator: Any,
    language_model: LanguageModel,
    denoiser: Denoiser,
    beside: LanguageModel | None = None,
) -> Parts:
    """What is trained between loaded models, and the optimizer. Raises ValueError where widths do not fit."""
    set_kernels(config.speed)
    lay_out(config.speed, denoiser)
    if config.weighting != "plain" and denoiser.prediction_type == "flow_prediction":
        raise ValueError(
            f"training.weighting {config.weighting!r} is for epsilon and v_prediction, the denoiser here is a flow: set it to "
            "'plain', and timesteps.kind to 'logit_normal' if levels are to count differently"
        )
    check_widths(config.connector, language_model, denoiser, beside)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        bridge = Bridge(config.connector, language_model_lora=language_model.lora, denoiser_lora=denoiser.lora)
    bridge.train()  # the LoRA came with their dropout off
    in_pieces = config.fsdp == "connector" and accelerator.num_processes > 1
    if in_pieces:
        spread(bridge, accelerator.device)
    fused = True if accelerator.device.type == "cuda" else None  # one kernel for all parameters
    optimizer = torch.optim.AdamW(
        _groups(config, bridge), betas=config.betas, weight_decay=config.weight_decay, fused=fused
    )
    # In pieces it averages its gradients itself: only the autocast is accelerate's.
    wrapped = accelerator.prepare_model(bridge, evaluation_mode=in_pieces)
    prepared = accelerator.prepare_optimizer(optimizer)
    bridge = accelerator.unwrap_model(wrapped)
    ema = None
    if config.ema_decay is not None:
        ema = {name: tensor.detach().clone() for name, tensor in bridge.state_dict().items()}
    return Parts(
        accelerator=accelerator,
        language_model=language_model,
        denoiser=denoiser,
        beside=beside,
        bridge=bridge,
        wrapped=wrapped,
        optimizer=prepared,
        ema=ema,
        empty_ids=tuple(language_model.tokenize([""])[0].tolist()),
        beside_empty_ids=tuple(beside.tokenize([""])[0].tolist()) if beside else (),
    )


def check_widths(
    connector: ConnectorConfig, language_model: LanguageModel, denoiser: Denoiser, beside: LanguageModel | None = None
) -> None:
    """Raises ValueError where the connector, or the tokens that stand beside its own, do not fit the models."""
    for name, wanted, given in (
        ("in_width", language_model.width, connector.in_width),
        ("layers", language_model.depth, connector.layers),
        ("width", denoiser.width, connector.width),
        ("pooled_width", denoiser.pooled_width, connector.pooled_width),
    ):
        if wanted != given:
            raise ValueError(f"connector.{name} is {given}, the models here want {wanted}: set it to {wanted}")
    if connector.kind == "queries":
        language_model.check_appended(connector.queries)
    if beside is not None and beside.width != denoiser.width:
        raise ValueError(
            f"training.beside gives tokens of width {beside.width}, the denoiser reads {denoiser.width}: take its own text "
            "encoder"
        )


def _groups(config: TrainingConfig, bridge: Bridge) -> list[dict[str, Any]]:
    """The optimizer's groups, in the order of the bridge's parameters: `scale` is of the phase's learning rate."""
    groups: list[dict[str, Any]] = []
    for name, part in bridge.named_children():
        lora = {"language_model_lora": config.language_model.lora, "denoiser_lora": config.denoiser.lora}.get(name)
        groups.append({"params": list(part.parameters()), "scale": lora.rate_scale if lora else 1.0})
    return groups


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
        beside=config.beside.tokenizer if config.beside else None,
        beside_empty_ids=parts.beside_empty_ids,
        caption_drop=config.caption_drop,
        crop=config.crop,
        flip=config.flip,
        cache=config.cache,
        cache_gib=config.cache_gib,
        drawn_latents=parts.denoiser.vae_facts.is_drawn,
        latents=phase.latents,
        timesteps=config.timesteps,
        view_weights=tuple(phase.views.values()),
        window=phase.window,
        timesteps_per_encoding=config.timesteps_per_encoding,
        rank=parts.accelerator.process_index,
        world=parts.accelerator.num_processes,
        threads=config.threads,
        ahead=config.ahead,
    )


def draws_dropout(config: TrainingConfig) -> bool:
    """Whether what is trained has dropout anywhere."""
    return any(
        getattr(one, "dropout", 0) for one in (config.connector, config.language_model.lora, config.denoiser.lora)
    )


def facts_of(config: TrainingConfig, views: Sequence[Sequence[View]], parts: Parts) -> dict[str, Any]:
    """Everything that a resumed run must agree with."""
    settings = plain(config, frozenset((*_FREE, *_APART)))
    phases = []
    for phase, of_phase in zip(config.phases, views, strict=True):
        tokenizer = config.language_model.tokenizer
        told: dict[str, Any] = {
            "views": {
                view.info.view: {
                    "weight": phase.views[view.info.view],
                    "manifest_sha256": view.info.manifest_sha256,
                    "captions": view.info.tokenizers[tokenizer]["captions"],
                }
                for view in of_phase
            }
        }
        if draws_dropout(config):  # by micro-batch
            told["micro_batch"] = phase.micro_batch_of(parts.accelerator.num_processes)
        phases.append(plain(phase, frozenset(["micro_batch", "view"])) | told)
    return {
        "training": settings | {"denoiser_dtype": config.denoiser.dtype},
        "connector": plain(config.connector),
        "language_model": parts.language_model.identity(),
        "denoiser": parts.denoiser.identity(),
        "beside": parts.beside.identity() if parts.beside else None,
        "phases": phases,
    }
