"""The training loop: frozen language model -> connector -> frozen denoiser -> loss -> one step of the connector.

Reads top to bottom in `train`. Everything that is drawn depends on positions alone (`objective`, `batches`), so a run
may stop at any step and go on with another number of processes: same samples, noise, timesteps, none lost, none twice.
"""

from __future__ import annotations

import hashlib
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.storage import Folder

from .batches import BadSample, Batch, Batches
from .bridge import Bridge, Conditioning
from .checkpoints import State, latest_checkpoint, restore, save_checkpoint, write_release
from .configuration import Phase, TrainingConfig, rate_at
from .denoisers import Denoiser
from .journal import Journal
from .objective import BINS, add_noise, binned, min_snr_weights, sample_losses, target_of
from .parts import Parts, batch_config, facts_of, load_parts, open_views

if TYPE_CHECKING:
    from accelerate import Accelerator

INTERRUPTED = 75
"""Exit code after SIGTERM: saved, to be started again (EX_TEMPFAIL)."""


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a finished run says."""

    release: Path
    """Folder of the release weights."""
    steps: int
    samples: int
    skipped: int
    """Steps skipped because something was not finite."""
    bad: int
    """Samples that could not be used."""
    seconds: float
    """Spent training, over all sittings."""
    loss: float | None
    """Mean over the last log line, where this sitting wrote one."""


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """Of one step, over all processes."""

    bins: torch.Tensor
    """float64 (2, BINS): sums of loss and of weights."""
    grad_norm: float
    skipped: bool
    unusable: int
    stop: bool
    bad: list[BadSample]
    """Of this process."""


def train(config: TrainingConfig, *, dataset: Folder, run: Path) -> TrainingResult:
    """Trains to the end of the last phase, from the last good checkpoint in `run` where there is one.

    Raises ValueError or FileNotFoundError in one line for what cannot work, before the first step; SystemExit(75) after
    SIGTERM, once the step is done and saved.
    """
    run.mkdir(parents=True, exist_ok=True)
    accelerator = start_processes(config)
    views = open_views(config, dataset)
    parts = load_parts(config, accelerator)
    batch_configs = [batch_config(config, number, parts) for number in range(len(config.phases))]
    facts = facts_of(config, views, parts)
    state = _resume(run, facts, parts)
    main, total, loss = accelerator.is_main_process, sum(phase.samples for phase in config.phases), None
    journal = Journal(run, main=main, samples=state.samples, total=total, phases=len(config.phases))
    with _sigterm() as asked, journal:
        accelerator.wait_for_everyone()  # the journal was cut before anyone writes
        journal.say(
            f"{sum(p.numel() for p in parts.bridge.parameters()):,} parameters to train, {total:,} samples in "
            f"{len(config.phases)} phases, {accelerator.num_processes} processes on {accelerator.device.type}"
        )
        for number in range(state.phase, len(config.phases)):
            phase = config.phases[number]
            if number > state.phase:
                state.phase, state.position = number, 0
            with Batches(views[number], batch_configs[number], state.position) as batches:
                while state.position < phase.samples:
                    began = time.monotonic()
                    rate = rate_at(phase, state.position)
                    outcome = _step(config, number, parts, batches, rate, asked)
                    _commit(config, phase, state, outcome, journal, parts, time.monotonic() - began)
                    if state.step % config.log_every == 0 or state.position == phase.samples:
                        loss = journal.log(state, rate, outcome.grad_norm)
                    done = state.position == phase.samples
                    due = state.samples % config.checkpoint_every < phase.batch  # a multiple was just passed
                    if due or done or outcome.stop:
                        _save(config, run, state, facts, parts)
                    if outcome.stop and state.samples < total:
                        journal.say(f"asked to stop: saved at {state.samples:,} samples, start again to go on")
                        raise SystemExit(INTERRUPTED)
    if main:
        write_release(run, facts, state, parts.bridge, parts.ema)
    accelerator.wait_for_everyone()
    return TrainingResult(
        release=run / "release",
        steps=state.step,
        samples=state.samples,
        skipped=state.skipped,
        bad=state.bad,
        seconds=state.seconds,
        loss=loss,
    )


def _step(
    config: TrainingConfig, number: int, parts: Parts, batches: Batches, rate: float, asked: threading.Event
) -> _Outcome:
    """One optimizer step over a global batch of phase `number`.

    The gradient is of sum(weight x loss) / sum(weight) over processes.
    """
    accelerator, optimizer, phase = parts.accelerator, parts.optimizer, config.phases[number]
    world = accelerator.num_processes
    micro_batches = phase.batch // (world * phase.micro_batch_of(world))
    tally = torch.zeros(2, BINS + 1, dtype=torch.float64, device=accelerator.device)
    bad: list[BadSample] = []
    optimizer.zero_grad()
    for turn in range(micro_batches):
        last = turn == micro_batches - 1
        with nullcontext() if last else accelerator.no_sync(parts.wrapped):
            losses, weights, times, unusable = _losses(parts, next(batches), f"{config.seed}/{number}")
            objective = losses * weights
            if config.min_snr is not None:
                objective = objective * min_snr_weights(config.min_snr, times, parts.denoiser.levels)
            # Over the whole batch, bad samples included: corrected below. Times `world`, as DDP averages over them.
            accelerator.backward(objective.sum() * (world / phase.batch))
        tally[:, :BINS] += binned(losses.detach(), weights, times, parts.denoiser.steps)
        bad += unusable
    tally[0, BINS], tally[1, BINS] = float(asked.is_set()), len(bad)
    _check_reached(parts.bridge)
    tally = accelerator.reduce(tally, "sum").cpu()
    loss, weight = float(tally[0, :BINS].sum()), float(tally[1, :BINS].sum())
    grad_norm = 0.0
    usable = weight > 0 and math.isfinite(loss)
    if usable:
        parameters = list(parts.bridge.parameters())
        if weight < phase.batch:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(phase.batch / weight)
        grad_norm = float(accelerator.clip_grad_norm_(parameters, config.clip or math.inf))
        # In fp16 an infinite gradient is the scaler's business: its step skips the update and lowers the scale, until nothing
        # is left to lower.
        scaler = accelerator.scaler
        usable = math.isfinite(grad_norm) or (scaler is not None and scaler.get_scale() >= 1)
    if usable:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        optimizer.step()
    optimizer.zero_grad()
    return _Outcome(
        bins=tally[:, :BINS],
        grad_norm=grad_norm,
        skipped=not usable,
        unusable=int(tally[1, BINS]),
        stop=bool(tally[0, BINS] > 0),
        bad=bad,
    )


def _check_reached(bridge: Bridge) -> None:
    """Raises ValueError where a backward pass left something out, as a LoRA behind the last layer that is read."""
    for name, parameter in bridge.named_parameters():
        if parameter.grad is None:
            where = name.replace("/", ".")
            advice = "leave it out of lora.targets" if "lora" in where else "this is a fault of the connector"
            raise ValueError(f"no gradient reaches {where}, so it cannot be trained: {advice}")


def _losses(parts: Parts, batch: Batch, draws: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[BadSample]]:
    """Per-sample losses (B,) with gradient, weights (B,), timesteps (B,), and the samples that could not be used. What dropout
    draws, where there is any, depends on `draws` and the batch's first position.
    """
    device, denoiser, levels = parts.accelerator.device, parts.denoiser, parts.denoiser.levels
    weights, times, noise = batch.weights.to(device), batch.timesteps.to(device), batch.noise.to(device)
    latents, told = _latents(denoiser, batch, device), levels.times[times]
    with _drawn_from(f"{draws}/{batch.positions[0]}", device):
        hidden, mask, is_finite = parts.language_model.encode_where_finite(
            batch.ids, batch.keys, appended=parts.bridge.appended
        )
        beside = None
        if parts.beside:
            *found, beside_finite = parts.beside.encode_where_finite(batch.beside_ids, batch.keys)
            beside, is_finite = Conditioning(*found), is_finite & beside_finite
        conditioning = parts.wrapped(hidden, mask, told, beside)
        predicted = denoiser.predict(
            add_noise(latents, noise, times, levels), told, conditioning, batch.sizes.to(device)
        )
    losses = sample_losses(predicted, target_of(latents, noise, times, levels))
    bad = list(batch.bad)
    if not bool(is_finite.all()):
        known = {one.position for one in bad}
        reason = "a language model gives values that are not finite"
        for number in (~is_finite).nonzero()[:, 0].tolist():
            if batch.positions[number] not in known:
                bad.append(BadSample(position=batch.positions[number], key=batch.keys[number], reason=reason))
        weights = weights * is_finite
    return losses, weights, times, bad


@contextmanager
def _drawn_from(name: str, device: torch.device) -> Iterator[None]:
    """Inside, torch's global generators draw what `name` alone decides; outside, nothing was drawn from them."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "little")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _latents(denoiser: Denoiser, batch: Batch, device: torch.device) -> torch.Tensor:
    """Scaled latents (B, C, h, w), float32: of the batch's pixels, or as the view holds them."""
    drawn = None if batch.posterior_noise is None else batch.posterior_noise.to(device)
    if batch.latents is not None:
        return denoiser.draw_stored(batch.latents.to(device), drawn)
    assert batch.pixels is not None
    return denoiser.encode_images(batch.pixels.to(device), drawn).float()


def _commit(
    config: TrainingConfig,
    phase: Phase,
    state: State,
    outcome: _Outcome,
    journal: Journal,
    parts: Parts,
    seconds: float,
) -> None:
    """Counts the step, averages the weights, and stops a run that skips too much or reads too many bad samples."""
    start = state.position
    state.step += 1
    state.position += phase.batch
    state.samples += phase.batch
    state.seconds += seconds
    state.window_samples += phase.batch
    state.window_seconds += seconds
    state.bad += outcome.unusable
    journal.bad(state.samples, state.phase, outcome.bad)
    if state.bad > max(10, config.bad_share * state.samples):
        raise ValueError(
            f"{state.bad} of {state.samples} samples could not be used, bad_share is {config.bad_share}: "
            "see ledger.jsonl in the run folder"
        )
    if outcome.skipped:
        state.skipped += 1
        loss = float(outcome.bins[0].sum())
        journal.skipped(state.samples, state.phase, start, phase.batch, loss, outcome.grad_norm)
        if state.skipped > config.skip_budget:
            raise FloatingPointError(
                f"{state.skipped} steps were not finite, skip_budget is {config.skip_budget}: see skipped.jsonl in the "
                "run folder; lower the rate or use bf16"
            )
        return
    window = (
        torch.tensor(state.window, dtype=torch.float64) if state.window else torch.zeros(2, BINS, dtype=torch.float64)
    )
    state.window = (window + outcome.bins).tolist()
    if parts.ema is not None and config.ema_decay is not None:
        decay = min(config.ema_decay, (1 + state.step) / (10 + state.step))  # short runs forget their start sooner
        for name, parameter in parts.bridge.state_dict().items():
            parts.ema[name].lerp_(parameter, 1 - decay)


def _save(config: TrainingConfig, run: Path, state: State, facts: dict[str, Any], parts: Parts) -> None:
    if parts.accelerator.scaler is not None:
        state.scaler = parts.accelerator.scaler.state_dict()
    if parts.accelerator.is_main_process:
        save_checkpoint(run, state, facts, parts.bridge, parts.optimizer, parts.ema, config.keep_checkpoints)
    parts.accelerator.wait_for_everyone()


def start_processes(config: TrainingConfig) -> Accelerator:
    """Joins the processes that torchrun or accelerate started. Raises ValueError where that cannot work."""
    from accelerate import Accelerator

    if config.precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("training.precision is 'fp16', which needs a GPU: use 'no' or 'bf16'")
    accelerator = Accelerator(mixed_precision=config.precision)
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != wanted:
        raise ValueError(
            f"{wanted} processes were started and accelerate sees {accelerator.num_processes}: on CPUs set "
            "ACCELERATE_USE_CPU=true"
        )
    return accelerator


def _resume(run: Path, facts: dict[str, Any], parts: Parts) -> State:
    from accelerate.utils import broadcast_object_list

    found = [latest_checkpoint(run) if parts.accelerator.is_main_process else None]
    path = broadcast_object_list(found)[0]  # all processes go on from the same one
    if path is None:
        return State()
    state = restore(path, facts, parts.bridge, parts.optimizer, parts.ema)
    if parts.accelerator.scaler is not None and state.scaler:
        parts.accelerator.scaler.load_state_dict(state.scaler)
    if parts.accelerator.is_main_process:
        print(f"going on from {path} at {state.samples:,} samples", flush=True)
    return state


@contextmanager
def _sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets; the former handler comes back afterwards."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked  # only the main thread may handle signals
        return
    former = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, former)
