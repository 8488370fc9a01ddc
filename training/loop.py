"""The training loop: frozen language model -> connector -> frozen denoiser -> loss -> one step of the connector.

Reads top to bottom in `train`. Everything that is drawn depends on positions alone (`objective`, `batches`), so a run
may stop at any step and go on with another number of processes: same samples, noise, timesteps, none lost, none twice.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.storage import Folder

from .batches import Batches
from .checkpoints import State, latest_checkpoint, restore, save_checkpoint, write_release
from .configuration import TrainingConfig
from .encoding import Encoder, encodes_ahead
from .journal import Journal
from .objective import BINS
from .parts import Parts, batch_config, facts_of, load_parts, open_views
from .phases import rate_at
from .step import Outcome, take_step

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
class _Sitting:
    """What all of a run's steps share, from its start or restart on."""

    config: TrainingConfig
    run: Path
    facts: dict[str, Any]
    parts: Parts
    journal: Journal
    asked: threading.Event
    """Set where the process is asked to stop."""


def train(config: TrainingConfig, *, dataset: Folder, run: Path) -> TrainingResult:
    """Trains to the end of the last phase, from the last good checkpoint in `run` where there is one.

    Raises ValueError or FileNotFoundError in one line for what cannot work, before the first step; SystemExit(75) after
    SIGTERM or SIGUSR1, once the step is done and saved.
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
    with _stop_signals() as asked, journal:
        accelerator.wait_for_everyone()  # the journal was cut before anyone writes
        journal.say(
            f"{sum(p.numel() for p in parts.bridge.parameters()):,} parameters to train, {total:,} samples in "
            f"{len(config.phases)} phases, {accelerator.num_processes} processes on {accelerator.device.type}"
        )
        sitting = _Sitting(config=config, run=run, facts=facts, parts=parts, journal=journal, asked=asked)
        for number in range(state.phase, len(config.phases)):
            if number > state.phase:
                state.phase, state.position = number, 0
            with Batches(views[number], batch_configs[number], state.position) as batches:
                encoder = Encoder(parts, batches, f"{config.seed}/{number}", ahead=encodes_ahead(config, parts))
                loss = _train_phase(sitting, state, encoder)
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


def _train_phase(sitting: _Sitting, state: State, encoder: Encoder) -> float | None:
    """The rest of the phase that `state` is in; the loss of the last log line, None where nothing was left to do."""
    config, journal = sitting.config, sitting.journal
    phase, loss = config.phases[state.phase], None
    while state.position < phase.samples:
        began = time.monotonic()
        rate = rate_at(phase, state.position)
        outcome = take_step(config, state.phase, sitting.parts, encoder, rate, sitting.asked)
        _commit(sitting, state, outcome, time.monotonic() - began)
        done = state.position == phase.samples
        if state.step % config.log_every == 0 or done:
            loss = journal.log(state, rate, outcome.grad_norm)
        due = state.samples % config.checkpoint_every < phase.batch  # a multiple was just passed
        if due or done or outcome.stop:
            _save(sitting, state)
        if outcome.stop and state.samples < sum(each.samples for each in config.phases):
            journal.say(f"asked to stop: saved at {state.samples:,} samples, start again to go on")
            raise SystemExit(INTERRUPTED)
    return loss


def _commit(sitting: _Sitting, state: State, outcome: Outcome, seconds: float) -> None:
    """Counts the step, averages the weights, and stops a run that skips too much or reads too many bad samples."""
    config, parts, journal = sitting.config, sitting.parts, sitting.journal
    phase = config.phases[state.phase]
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
        journal.skipped(state.samples, state.phase, start, phase.batch, loss, outcome.grad_norm, outcome.keys)
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


def _save(sitting: _Sitting, state: State) -> None:
    parts = sitting.parts
    if parts.accelerator.scaler is not None:
        state.scaler = parts.accelerator.scaler.state_dict()
    if parts.accelerator.is_main_process:
        keep = sitting.config.keep_checkpoints
        save_checkpoint(sitting.run, state, sitting.facts, parts.bridge, parts.optimizer, parts.ema, keep)
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
def _stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGUSR1 set, as batch systems send them; the former handlers come back afterwards."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked  # only the main thread may handle signals
        return
    former = {number: signal.signal(number, lambda *_: asked.set()) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield asked
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
