"""Where a step does not fit the device: what it holds, what a sample adds, and so which micro-batch would fit."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from .batches import Batch
from .configuration import TrainingConfig
from .encoding import encode, encodes_ahead
from .fsdp import in_pieces, piece
from .parts import Parts, batch_config
from .phases import Phase
from .step import losses_of

SLACK = 0.05
"""Share of the memory that is left out of the arithmetic: gaps between blocks, and what libraries take for themselves."""


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes that a process holds from its second step on, whatever the batch."""

    frozen: int
    """Weights of language models, denoiser and VAE."""
    weights: int
    """Of what is trained."""
    gradients: int
    """Once more where DDP averages them, in the buckets that they are sent in."""
    moments: int
    """AdamW's two."""
    average: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.frozen + self.weights + self.gradients + self.moments + self.average


class Gauge:
    """What a CUDA device tells of its memory, in bytes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def allocated(self) -> int:
        """Held by tensors of this process; what nothing refers to any more is given back first."""
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated(self.device)

    def free(self) -> int:
        """Left for this process."""
        return torch.cuda.mem_get_info(self.device)[0]

    def reset(self) -> None:
        """Begins `peak` anew."""
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        """Most that tensors held at once."""
        return torch.cuda.max_memory_allocated(self.device)


def gauge_of(device: torch.device) -> Gauge | None:
    """The device's, where it has one."""
    return Gauge(device) if device.type == "cuda" else None


LOADING = "while the models were loaded: set denoiser.dtype and language_model.dtype to 'bfloat16'"
SAVING = "while a checkpoint was copied into the host's memory: leave it room for weights, AdamW's moments and average"
COUNTING = "while the FLOPs of a sample were counted: set training.measure_peak to False"
VALIDATING = "in a validation: lower validation.batch or validation.resolution"
_SAID = ("out of memory", "ALLOC_FAILED", "can't allocate memory")  # CUDA pinning the host's, its libraries, the host


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had too little: torch has one class for that on GPUs and none on processors."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _SAID)


@contextmanager
def out_of_memory(where: str) -> Iterator[None]:
    """Inside, too little memory is a MemoryError of one line; `where` says in which part of a run, and what to set."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(f"out of memory {where}, or take a device with more memory") from error


def held(parts: Parts) -> Held:
    """What a process holds of `parts`, by the sizes of its tensors, or of its pieces of them."""
    trained = list(parts.bridge.parameters())
    known = {id(tensor) for tensor in trained}
    models = [parts.language_model.module, parts.denoiser.network, parts.denoiser.vae]
    models += [parts.beside.module] if parts.beside else []
    frozen = {
        id(tensor): tensor
        for model in models
        if model is not None
        for tensor in (*model.parameters(), *model.buffers())
        if id(tensor) not in known  # a LoRA lies inside
    }
    weights = _bytes(trained)
    return Held(
        frozen=_bytes(frozen.values()),
        weights=weights,
        gradients=weights * (1 if in_pieces(parts.bridge) or parts.accelerator.num_processes == 1 else 2),
        moments=2 * weights,
        average=_bytes(parts.ema.values()) if parts.ema else 0,
    )


def sample_bytes(config: TrainingConfig, number: int, parts: Parts, gauge: Gauge) -> int | None:
    """What one sample of phase `number` adds to what is held, measured by one alone; None where even that does not fit.

    No other process takes part: the connector is called past what averages gradients, and no gradient is kept.
    """
    before = gauge.allocated()
    gauge.reset()
    try:
        one = encode(parts, _sample(config, number, parts), "memory")
        # The next batch is encoded in memory of another stream's, which the step's does not become.
        ahead = gauge.peak() - before if encodes_ahead(config, parts) else 0
        losses = losses_of(replace(parts, wrapped=parts.bridge), one, "memory")
        torch.autograd.grad(losses.sum(), list(parts.bridge.parameters()), allow_unused=True)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None
    return gauge.peak() - before + ahead


def largest_micro_batch(phase: Phase, processes: int, most: int) -> int:
    """The largest micro_batch of at most `most` samples that divides a process's share of the batch; 0 where none does."""
    share = phase.batch // processes
    return max((size for size in range(1, min(most, share) + 1) if share % size == 0), default=0)


def advice(config: TrainingConfig, number: int, parts: Parts, gauge: Gauge | None) -> str:
    """What to say, in one line, after a step of phase `number` did not fit and its tensors are gone."""
    phase, world = config.phases[number], parts.accelerator.num_processes
    now, static = phase.micro_batch_of(world), held(parts)
    parts.optimizer.zero_grad()
    trained = static.total - static.frozen
    said = (
        f"out of memory on {parts.accelerator.device} in phase {phase.view!r} with micro_batch {now}: the frozen models take "
        f"{_told(static.frozen)}, what is trained {_told(trained)} (weights {_told(static.weights)}, gradients "
        f"{_told(static.gradients)}, AdamW {_told(static.moments)}, average {_told(static.average)})"
    )
    most = now - 1
    # Pieces are put together by all processes at once, and the others are elsewhere.
    room = _room(config, number, parts, gauge, static) if gauge is not None and not in_pieces(parts.bridge) else None
    if room is not None:
        most = min(most, room.samples)
        said += _told_of(room)
    best = largest_micro_batch(phase, world, most)
    ways = [f"set the phase's micro_batch to {best}"] if best else []
    return f"{said}: {', or '.join(ways + _remedies(config, phase, parts)) or 'take a device with more memory'}"


@dataclass(frozen=True, kw_only=True)
class _Room:
    """What a device has for samples, in bytes."""

    usable: int
    """With what is held."""
    sample: int | None
    """Each takes so much; None where one is too much."""
    samples: int
    """That fit."""


def _room(config: TrainingConfig, number: int, parts: Parts, gauge: Gauge, static: Held) -> _Room:
    """Measures what phase `number` has room for; `static` is what is held once it trains."""
    now_held = gauge.allocated()
    usable = int((1 - SLACK) * (now_held + gauge.free()))
    sample = sample_bytes(config, number, parts, gauge)
    fit = 0 if sample is None else max(0, (usable - max(static.total, now_held)) // max(1, sample))
    return _Room(usable=usable, sample=sample, samples=fit)


def _told_of(room: _Room) -> str:
    usable = _told(room.usable)
    if room.sample is None:
        return f" of {usable} that are usable, and not even one sample fits beside them"
    return f", each sample {_told(room.sample)}, and {usable} are usable, so {room.samples} samples fit"


def _remedies(config: TrainingConfig, phase: Phase, parts: Parts) -> list[str]:
    """What else makes a step smaller and is not set yet."""
    known = (
        (
            not config.denoiser.gradient_checkpointing,
            "set denoiser.gradient_checkpointing, which computes activations twice",
        ),
        (config.denoiser.dtype == "float32", "set denoiser.dtype to 'bfloat16'"),
        (phase.latents == "off", "set the phase's latents to 'view', which leaves out the VAE"),
        (config.timesteps_per_encoding > 1, "lower timesteps_per_encoding"),
        (encodes_ahead(config, parts), "set speed.encode_ahead to False"),
    )
    return [way for helps, way in known if helps]


def _sample(config: TrainingConfig, number: int, parts: Parts) -> Batch:
    """A micro-batch of one sample, empty but as large as any."""
    known = batch_config(config, number, parts)
    channels, height, width = known.latent_shape
    latents = torch.zeros(1, channels * (2 if known.drawn_latents else 1), height, width)
    pixels = torch.zeros(1, 3, known.resolution, known.resolution)
    beside = [_longest(known.beside_empty_ids, parts.beside.tokenizer.limit)] if parts.beside else []
    return Batch(
        positions=[0],
        keys=["a sample"],
        pixels=pixels if known.latents == "off" else None,
        latents=latents if known.latents == "view" else None,
        ids=[_longest(known.empty_ids, parts.language_model.tokenizer.limit)],
        beside_ids=beside,
        sizes=torch.full((1, 6), float(known.resolution)),
        timesteps=torch.zeros(known.timesteps_per_encoding, dtype=torch.int64),
        noise=torch.zeros(known.timesteps_per_encoding, *known.latent_shape),
        posterior_noise=torch.zeros(1, *known.latent_shape) if known.drawn_latents else None,
        weights=torch.ones(1),
        bad=[],
    )


def _longest(ids: tuple[int, ...], length: int) -> np.ndarray:
    return np.resize(np.asarray(ids, dtype=np.int32), length)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(piece(tensor).nbytes for tensor in tensors)


def _told(count: int) -> str:
    """Bytes for people."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 2**10:.1f} KiB"
