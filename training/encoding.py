"""What the frozen models make of a batch before anything that is trained sees it: latents, and hidden states of its texts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch

from pipeline.devices import sent

from .batches import BadSample, Batch
from .bridge import Conditioning
from .configuration import TrainingConfig
from .denoisers import Denoiser
from .parts import Parts

NOT_FINITE = "a language model gives values that are not finite"


@dataclass(frozen=True, kw_only=True)
class Slots:
    """Which samples a micro-batch holds, and which of them could not be used."""

    positions: list[int]
    keys: list[str]
    bad: list[BadSample]
    """Those that could not be read."""
    is_finite: torch.Tensor
    """bool (B,), whether the language models' values are; on the device."""

    def unusable(self) -> list[BadSample]:
        """The samples that weigh nothing, and why. Waits for the device."""
        bad = list(self.bad)
        known = {one.position for one in bad}
        for number in (~self.is_finite).nonzero()[:, 0].tolist():
            if self.positions[number] not in known:
                bad.append(
                    BadSample(position=self.positions[number], key=self.keys[number], shard="", reason=NOT_FINITE)
                )
        return bad


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A micro-batch on the device. Where samples are seen at K timesteps, B counts each of them K times, one behind the other;
    only `slots` knows them once.
    """

    slots: Slots
    latents: torch.Tensor
    """float32 (B, C, h, w), scaled."""
    noise: torch.Tensor
    """float32 (B, C, h, w)"""
    timesteps: torch.Tensor
    """int64 (B,)"""
    sizes: torch.Tensor
    """float32 (B, 6), as in `Batch`."""
    hidden: torch.Tensor
    """(B, L, W), or (B, layers, L, W), of the language model; with a gradient where something in it is trained."""
    mask: torch.Tensor
    """bool (B, L)"""
    beside: Conditioning | None
    """What the second text encoder says."""
    weights: torch.Tensor
    """float32 (B,): 1, or 0 for what could not be used."""

    def tensors(self) -> list[torch.Tensor]:
        """All that lies on the device."""
        given = (getattr(self, field.name) for field in fields(self))
        beside = () if self.beside is None else self.beside
        return [one for one in (*given, *beside, self.slots.is_finite) if isinstance(one, torch.Tensor)]


class Encoder:
    """Iterates over batches encoded one by one as they are asked for; or one ahead, on a stream of their own."""

    def __init__(self, parts: Parts, batches: Iterator[Batch], draws: str, *, ahead: bool) -> None:
        """`ahead` as `encodes_ahead` says; on a processor, where streams are one, it only changes the order."""
        self._parts, self._batches, self._draws = parts, batches, draws
        self._device = parts.accelerator.device
        self._streams: Any = torch.get_device_module(self._device)
        self._side: Any = self._streams.Stream() if ahead else None
        self._begun: Any = self._streams.Event() if ahead else None
        self._next: Encoded | None = None

    def __iter__(self) -> Encoder:
        return self

    def __next__(self) -> Encoded:
        if self._side is None:
            found = self._encode()
            if found is None:
                raise StopIteration
            return found
        main = self._streams.current_stream()
        if self._next is None:
            self._begun.record(main)
            self.look_ahead()
        found, self._next = self._next, None
        if found is None:
            raise StopIteration
        main.wait_stream(self._side)
        for tensor in found.tensors():
            if tensor.is_cuda:  # else the side stream would write over what `main` has still to read
                tensor.record_stream(main)
        self._begun.record(main)
        return found

    def look_ahead(self) -> None:
        """Begins the next batch beside what the device is busy with. Called once the backward pass is queued, it fills the time
        in which gradients are exchanged and the host waits for the result.

        It waits for what was queued before the last batch was handed out (such as weights on their way to the device), not for
        the step over that batch.
        """
        if self._side is not None and self._next is None:
            self._side.wait_event(self._begun)
            with self._streams.stream(self._side):
                self._next = self._encode()

    def _encode(self) -> Encoded | None:
        """The next batch, None after the last."""
        batch = next(self._batches, None)
        return None if batch is None else encode(self._parts, batch, self._draws)


def encodes_ahead(config: TrainingConfig, parts: Parts) -> bool:
    """Whether the next batch can be encoded during a step: on a GPU, and not where its hidden states wait for what the step
    changes.
    """
    trains_text = bool(parts.language_model.lora) or parts.bridge.appended is not None
    return config.speed.encode_ahead and parts.accelerator.device.type == "cuda" and not trains_text


def encode(parts: Parts, batch: Batch, draws: str) -> Encoded:
    """Runs VAE and language models. What a LoRA's dropout draws depends on `draws` and the batch's first position."""
    device, times = parts.accelerator.device, len(batch.timesteps) // len(batch.positions)
    with drawn_from(f"{draws}/{batch.positions[0]}/text", device):
        hidden, mask, is_finite = parts.language_model.encode_where_finite(
            batch.ids, batch.keys, appended=parts.bridge.appended
        )
    beside = None
    if parts.beside:
        tokens, seen, beside_finite = parts.beside.encode_where_finite(batch.beside_ids, batch.keys)
        beside = Conditioning(_repeated(tokens, times), _repeated(seen, times))
        is_finite = is_finite & beside_finite
    # Last, as the host looks at the texts' masks and would wait for what was queued before.
    latents = _latents(parts.denoiser, batch, device)
    return Encoded(
        slots=Slots(positions=batch.positions, keys=batch.keys, bad=batch.bad, is_finite=is_finite),
        latents=_repeated(latents, times),
        noise=sent(batch.noise, device),
        timesteps=sent(batch.timesteps, device),
        sizes=_repeated(sent(batch.sizes, device), times),
        hidden=_repeated(hidden, times),
        mask=_repeated(mask, times),
        beside=beside,
        weights=_repeated(sent(batch.weights, device) * is_finite, times),
    )


def _repeated(one: torch.Tensor, times: int) -> torch.Tensor:
    """(B, …) -> (B x times, …), each row `times` times; itself for 1."""
    return one if times == 1 else one.repeat_interleave(times, dim=0)


def _latents(denoiser: Denoiser, batch: Batch, device: torch.device) -> torch.Tensor:
    """Scaled latents (B, C, h, w), float32: of the batch's pixels, or as the view holds them."""
    drawn = None if batch.posterior_noise is None else sent(batch.posterior_noise, device)
    if batch.latents is not None:
        return denoiser.draw_stored(sent(batch.latents, device), drawn)
    assert batch.pixels is not None
    return denoiser.encode_images(sent(batch.pixels, device), drawn).float()


@contextmanager
def drawn_from(name: str, device: torch.device) -> Iterator[None]:
    """Inside, torch's global generators draw what `name` alone decides; outside, nothing was drawn from them."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "little")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
