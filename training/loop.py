"""The training loop: frozen language model -> connector -> frozen denoiser -> loss -> one step of the connector.

Reads top to bottom in `train`. Everything that is drawn depends on positions alone (`objective`, `batches`), so a run
may stop at any step and go on with another number of processes: same samples, noise, timesteps, none lost, none twice.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

from pipeline.shards import View
from pipeline.storage import Folder
from pipeline.versions import commit, versions

from .bad_samples import bad_run
from .batches import Batch, BatchConfig, Batches
from .checkpoint_writer import CheckpointWriter
from .checkpoints import State, latest_checkpoint, restore
from .configuration import TrainingConfig
from .encoding import Encoder, encodes_ahead
from .flops import peak_of, sample_flops
from .fsdp import whole_of
from .journal import Journal, finite
from .memory import COUNTING, LOADING, SAVING, VALIDATING, advice, gauge_of, is_out_of_memory, out_of_memory
from .norms import modulation_norms
from .objective import BINS
from .parts import Parts, batch_config, facts_of, load_parts
from .phases import Phase, rate_at
from .processes import INTERRUPTED, agreed, gathered, start_processes, stop_signals
from .releases import write_release
from .step import Outcome, take_step
from .trackers import check_trackers
from .validation import Validation
from .views import check_batches, check_shapes, open_held_out, open_views
from .whole_files import locked


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
    parts: Parts
    journal: Journal
    writer: CheckpointWriter
    validation: Validation | None
    asked: threading.Event
    """Set where the process is asked to stop."""


def train(
    config: TrainingConfig, *, dataset: Folder, run: Path, asked: threading.Event | None = None
) -> TrainingResult:
    """Trains to the end of the last phase, from the last good checkpoint in `run` where there is one.

    Raises ValueError or FileNotFoundError in one line for what cannot work, before the first step; SystemExit(75) after
    SIGTERM or SIGUSR1, or once `asked` is set in one of the processes, when the step is done and saved.
    """
    check_trackers(config.trackers)
    run.mkdir(parents=True, exist_ok=True)
    accelerator = start_processes(config)
    with locked(run) if accelerator.is_main_process else nullcontext():
        return _train(config, dataset, run, accelerator, asked)


def _train(
    config: TrainingConfig, dataset: Folder, run: Path, accelerator: Any, asked: threading.Event | None
) -> TrainingResult:
    main, processes = accelerator.is_main_process, accelerator.num_processes
    check_batches(config, processes)
    views = open_views(config, dataset)
    held_out = open_held_out(config, dataset, views)
    with out_of_memory(LOADING):
        parts = load_parts(config, accelerator)
    check_shapes(parts.denoiser, views)
    batch_configs = [batch_config(config, number, parts) for number in range(len(config.phases))]
    facts = facts_of(config, views, parts)
    with out_of_memory(LOADING):
        state = _resume(run, facts, parts)
    state.held_out = held_out.info.manifest_sha256 if held_out else ""
    validation = Validation(config, held_out, parts, run, facts, state) if config.validation else None
    told = facts | {"commit": commit(), "versions": versions(), "processes": processes}
    journal = Journal(run, main=main, samples=state.samples, phases=config.phases, trackers=config.trackers, facts=told)
    writer = CheckpointWriter(run, facts, keep=config.keep_checkpoints, main=main, say=journal.say)
    with stop_signals(asked) as asked, journal, writer:
        accelerator.wait_for_everyone()  # the journal was cut before anyone writes
        journal.say(
            f"{sum(p.numel() for p in parts.bridge.parameters()):,} parameters to train, {config.samples:,} samples in "
            f"{len(config.phases)} phases, {processes} processes on {accelerator.device.type}"
        )
        sitting = _Sitting(
            config=config, parts=parts, journal=journal, writer=writer, validation=validation, asked=asked
        )
        if config.measure_peak and main:
            journal.measured(peak_of(run, accelerator.device, getattr(torch, config.denoiser.dtype)), processes)
        loss = _train_phases(sitting, state, list(zip(views, batch_configs, strict=True)))
    trained, ema = whole_of(parts.bridge.state_dict()), whole_of(parts.ema or {})
    if main:
        write_release(run, facts, state, trained, ema)
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


def _train_phases(sitting: _Sitting, state: State, data: list[tuple[list[View], BatchConfig]]) -> float | None:
    """What is left of the run; the loss of its last log line, None where nothing was left. `data` is by phase."""
    config, parts, loss = sitting.config, sitting.parts, None
    _validate(sitting, state)
    for number in range(state.phase, len(config.phases)):
        phase = config.phases[number]
        if number > state.phase:
            _hand_over(phase, parts, state)
            state.phase, state.position = number, 0
        if state.position == phase.samples:  # this sitting began at its end
            continue
        views, of_phase = data[number]
        with Batches(views, of_phase, state.position) as batches:
            left = (phase.samples - state.position) // (of_phase.world * of_phase.micro_batch)
            given = sitting.journal.timed(_counted(sitting, islice(batches, left)))
            encoder = Encoder(parts, given, f"{config.seed}/{number}", ahead=encodes_ahead(config, parts))
            loss = _train_phase(sitting, state, encoder)
    return loss


def _train_phase(sitting: _Sitting, state: State, encoder: Encoder) -> float | None:
    """The rest of the phase that `state` is in; the loss of the last log line."""
    config, journal = sitting.config, sitting.journal
    phase, loss = config.phases[state.phase], None
    while state.position < phase.samples:
        began = time.monotonic()
        rate = rate_at(phase, state.position)
        done = state.position + phase.batch == phase.samples
        logged = done or (state.step + 1) % config.log_every == 0
        outcome = _step_in_memory(sitting, state, encoder, rate, logged)
        _commit(sitting, state, outcome, time.monotonic() - began)
        journal.advance(state)
        if logged:
            loss = journal.log(state, rate, outcome.grad_norm, _norms(sitting.parts, outcome))
        sitting.writer.check()
        stops = outcome.stop and state.samples < config.samples
        if not stops:  # there may be seconds left: then it is the next sitting's first act
            _validate(sitting, state)
        due = state.samples % config.checkpoint_every < phase.batch  # a multiple was just passed
        if due or done or stops:
            _save(sitting, state)
        if stops:
            sitting.writer.wait()
            journal.say(f"asked to stop: saved at {state.samples:,} samples, start again to go on")
            sitting.parts.accelerator.wait_for_everyone()  # who starts processes ends the others when the first has ended
            raise SystemExit(INTERRUPTED)
    return loss


def _step_in_memory(sitting: _Sitting, state: State, encoder: Encoder, rate: float, logged: bool) -> Outcome:
    """`take_step`. Raises MemoryError that says what would fit, where the device has too little."""
    config, parts = sitting.config, sitting.parts
    try:
        return take_step(config, state.phase, parts, encoder, rate, sitting.asked, with_norms=logged)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    # The error held the step's tensors until that block was left.
    raise MemoryError(advice(config, state.phase, parts, gauge_of(parts.accelerator.device)))


def _hand_over(phase: Phase, parts: Parts, state: State) -> None:
    """Begins what `phase` does not keep of the one before anew. What is saved at a phase's end is not yet handed over, and what
    is saved inside the next one is, so a run that goes on does this once.
    """
    if phase.optimizer == "fresh":
        parts.optimizer.state.clear()
    if phase.ema == "fresh" and parts.ema is not None:
        for name, parameter in parts.bridge.state_dict().items():
            parts.ema[name].copy_(parameter)
        state.average_from = state.step


def _counted(sitting: _Sitting, batches: Iterator[Batch]) -> Iterator[Batch]:
    """The batches of a phase; where the share of the machine is asked for, its FLOPs were counted with the first."""
    if not sitting.config.measure_peak:
        return batches
    first = next(batches)
    counted = None
    try:
        with out_of_memory(COUNTING):
            counted = sample_flops(sitting.parts, first).total
    except MemoryError as error:  # counting keeps activations, which a step may not
        if sitting.config.fsdp != "off":  # the other processes would wait for this one's pieces
            raise
        sitting.journal.say(f"{error}; the log tells no share of the machine in this phase")
    sitting.journal.counted(counted)
    return chain([first], batches)


def _norms(parts: Parts, outcome: Outcome) -> dict[str, Any]:
    """For the log: the gradient's norm by part, and how much the timestep changes."""
    of_parts = {name: finite(float(norm)) for name, norm in outcome.part_norms.items()}
    return ({"grad_norms": of_parts} if of_parts else {}) | modulation_norms(parts.bridge, parts.denoiser.levels.times)


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
    _check_samples(sitting, state, outcome)
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
        age = state.step - state.average_from
        decay = min(config.ema_decay, (1 + age) / (10 + age))  # short runs forget their start sooner
        for name, parameter in parts.bridge.state_dict().items():
            parts.ema[name].lerp_(parameter, 1 - decay)


def _check_samples(sitting: _Sitting, state: State, outcome: Outcome) -> None:
    """Writes down what could not be used, and stops a run that reads too much of it, or one bad sample after the other. Those
    of all processes make a run, in the order of positions.
    """
    if not outcome.unusable:
        state.bad_run = 0
        return
    config = sitting.config
    bad = sorted(gathered(outcome.bad), key=lambda one: one.position)  # all processes know that there are some
    sitting.journal.bad(state.samples, state.phase, bad)
    positions = range(state.position - config.phases[state.phase].batch, state.position)
    longest, state.bad_run = bad_run((one.position for one in bad), positions, state.bad_run)
    told = f"the last is {bad[-1].key!r}: {bad[-1].reason}; ledger.jsonl in the run folder tells all and their shards"
    if longest >= config.bad_in_a_row:
        raise ValueError(f"{longest} samples in a row could not be used, bad_in_a_row is {config.bad_in_a_row}; {told}")
    if state.bad > max(10, config.bad_share * state.samples):
        raise ValueError(
            f"{state.bad} of {state.samples} samples could not be used, bad_share is {config.bad_share}; {told}"
        )


def _validate(sitting: _Sitting, state: State) -> None:
    """Looks at the run where that is due. Before a checkpoint, which knows of it, so that none is repeated or left out."""
    if sitting.validation is not None and sitting.validation.due(state):
        with out_of_memory(VALIDATING):
            sitting.validation.run(state, sitting.journal)


def _save(sitting: _Sitting, state: State) -> None:
    parts = sitting.parts
    if parts.accelerator.scaler is not None:
        state.scaler = parts.accelerator.scaler.state_dict()
    with out_of_memory(SAVING):
        sitting.writer.save(state, parts.bridge, parts.optimizer, parts.ema)


def _resume(run: Path, facts: dict[str, Any], parts: Parts) -> State:
    path = agreed(latest_checkpoint(run) if parts.accelerator.is_main_process else None)  # the same one for all
    if path is None:
        return State()
    state = restore(path, facts, parts.bridge, parts.optimizer, parts.ema)
    if parts.accelerator.scaler is not None and state.scaler:
        parts.accelerator.scaler.load_state_dict(state.scaler)
    if parts.accelerator.is_main_process:
        print(f"going on from {path} at {state.samples:,} samples", flush=True)
    return state
