"""One optimizer step over a global batch: connector -> frozen denoiser -> loss -> gradient -> update, or a step skipped."""

from __future__ import annotations

import math
import threading
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from .batches import BadSample
from .bridge import Bridge
from .configuration import TrainingConfig
from .encoding import Encoded, Encoder, Slots, drawn_from
from .fsdp import unsynced, whole
from .norms import gradient_norms
from .objective import BINS, add_noise, binned, loss_weights, sample_losses, target_of
from .parts import Parts


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of one step, over all processes."""

    bins: torch.Tensor
    """float64 (2, BINS): sums of loss and of weights."""
    grad_norm: float
    part_norms: dict[str, torch.Tensor]
    """The gradient's norm by part of the bridge, as `gradient_norms` has it; on the device. Empty where it was not asked for."""
    skipped: bool
    """Whether something was not finite, so that nothing was changed."""
    unusable: int
    """Samples that could not be used."""
    stop: bool
    """Whether a process was asked to stop."""
    bad: list[BadSample]
    """Of this process."""
    keys: list[str]
    """Of this process, in the order of its positions."""


def take_step(
    config: TrainingConfig,
    number: int,
    parts: Parts,
    encoder: Encoder,
    rate: float,
    asked: threading.Event,
    *,
    with_norms: bool = False,
) -> Outcome:
    """One step over a global batch of phase `number`, whose micro-batches `encoder` gives.

    The gradient is of sum(weight x loss) / sum(weight) over processes. The device is waited for twice: for the sums, before the
    update, and in it for the gradient's norm. `with_norms`: those of the bridge's parts too, which all processes must ask for.
    """
    accelerator, phase = parts.accelerator, config.phases[number]
    world = accelerator.num_processes
    micro_batches = phase.batch // (world * phase.micro_batch_of(world))
    count = phase.batch * config.timesteps_per_encoding
    tally = torch.zeros(2, BINS + 1, dtype=torch.float64, device=accelerator.device)
    seen: list[Slots] = []
    parts.optimizer.zero_grad()
    for turn in range(micro_batches):
        last = turn == micro_batches - 1
        one = next(encoder)
        with nullcontext() if last else unsynced(accelerator, parts.wrapped):
            losses = losses_of(parts, one, f"{config.seed}/{number}")
            objective = losses * one.weights
            if config.weighting != "plain":
                levels = parts.denoiser.levels
                objective = objective * loss_weights(config.weighting, config.gamma, one.timesteps, levels)
            # Over the whole batch, bad samples included: corrected below. Times `world`, as DDP averages over them.
            accelerator.backward(objective.sum() * (world / count))
        encoder.look_ahead()
        tally[:, :BINS] += binned(losses.detach(), one.weights, one.timesteps, parts.denoiser.steps)
        tally[1, BINS] += (one.weights == 0).sum() // config.timesteps_per_encoding
        seen.append(one.slots)
    tally[0, BINS] = float(asked.is_set())
    _check_reached(parts.bridge)
    tally = accelerator.reduce(tally, "sum").cpu()
    loss, weight = float(tally[0, :BINS].sum()), float(tally[1, :BINS].sum())
    grad_norm, part_norms = 0.0, {}
    usable = weight > 0 and math.isfinite(loss)
    if usable:
        grad_norm, usable = _update(config, parts, count / weight, rate)
        if with_norms:
            unclipped = max(1.0, grad_norm / config.clip) if config.clip else 1.0
            part_norms = {name: norm * unclipped for name, norm in gradient_norms(parts.bridge).items()}
    parts.optimizer.zero_grad()
    return Outcome(
        bins=tally[:, :BINS],
        grad_norm=grad_norm,
        part_norms=part_norms,
        skipped=not usable,
        unusable=int(tally[1, BINS]),
        stop=bool(tally[0, BINS] > 0),
        bad=[bad for one in seen for bad in one.unusable()] if tally[1, BINS] else [],
        keys=[key for one in seen for key in one.keys],
    )


def losses_of(parts: Parts, encoded: Encoded, draws: str) -> torch.Tensor:
    """Losses (B,) with gradient, each of a sample at a timestep. What dropout draws depends on `draws` and the batch's first
    position.
    """
    denoiser, levels, times = parts.denoiser, parts.denoiser.levels, encoded.timesteps
    told = levels.times[times]
    with drawn_from(f"{draws}/{encoded.slots.positions[0]}", parts.accelerator.device):
        conditioning = parts.wrapped(encoded.hidden, encoded.mask, told, encoded.beside)
        noisy = add_noise(encoded.latents, encoded.noise, times, levels)
        predicted = denoiser.predict(noisy, told, conditioning, encoded.sizes)
    return sample_losses(predicted, target_of(encoded.latents, encoded.noise, times, levels))


def _update(config: TrainingConfig, parts: Parts, correction: float, rate: float) -> tuple[float, bool]:
    """Changes the weights by the gradients times `correction`; their norm, and whether it was finite."""
    accelerator, optimizer = parts.accelerator, parts.optimizer
    parameters = list(parts.bridge.parameters())
    if correction != 1:
        for parameter in parameters:
            parameter.grad.mul_(correction)  # type: ignore[union-attr]  # `_check_reached` saw it
    grad_norm = float(whole(accelerator.clip_grad_norm_(parameters, config.clip or math.inf)))
    # In fp16 an infinite gradient is the scaler's business: its step skips the update and lowers the scale, until nothing
    # is left to lower.
    scaler = accelerator.scaler
    if not (math.isfinite(grad_norm) or (scaler is not None and scaler.get_scale() >= 1)):
        if scaler is not None:
            scaler.update()  # it knows these gradients as unscaled, and would not unscale the next step's
        return grad_norm, False
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
    optimizer.step()
    return grad_norm, True


def _check_reached(bridge: Bridge) -> None:
    """Raises ValueError where a backward pass left something out, as a LoRA behind the last layer that is read."""
    for name, parameter in bridge.named_parameters():
        if parameter.grad is None:
            where = name.replace("/", ".")
            advice = "leave it out of lora.targets" if "lora" in where else "this is a fault of the connector"
            raise ValueError(f"no gradient reaches {where}, so it cannot be trained: {advice}")
