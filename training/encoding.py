"""What the frozen models make of a batch before anything that is trained sees it: latents, and hidden states of its texts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from .batches import BadSample, Batch
from .bridge import Conditioning
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


def encoded(parts: Parts, batches: Iterable[Batch], draws: str) -> Iterator[Encoded]:
    """The batches, encoded one by one as they are asked for."""
    for batch in batches:
        yield encode(parts, batch, draws)


def encode(parts: Parts, batch: Batch, draws: str) -> Encoded:
    """Runs VAE and language models. What a LoRA's dropout draws depends on `draws` and the batch's first position."""
    device, times = parts.accelerator.device, len(batch.timesteps) // len(batch.positions)
    latents = _latents(parts.denoiser, batch, device)
    with drawn_from(f"{draws}/{batch.positions[0]}/text", device):
        hidden, mask, is_finite = parts.language_model.encode_where_finite(
            batch.ids, batch.keys, appended=parts.bridge.appended
        )
    beside = None
    if parts.beside:
        tokens, seen, beside_finite = parts.beside.encode_where_finite(batch.beside_ids, batch.keys)
        beside = Conditioning(_repeated(tokens, times), _repeated(seen, times))
        is_finite = is_finite & beside_finite
    return Encoded(
        slots=Slots(positions=batch.positions, keys=batch.keys, bad=batch.bad, is_finite=is_finite),
        latents=_repeated(latents, times),
        noise=batch.noise.to(device),
        timesteps=batch.timesteps.to(device),
        sizes=_repeated(batch.sizes.to(device), times),
        hidden=_repeated(hidden, times),
        mask=_repeated(mask, times),
        beside=beside,
        weights=_repeated(batch.weights.to(device) * is_finite, times),
    )


def _repeated(one: torch.Tensor, times: int) -> torch.Tensor:
    """(B, …) -> (B x times, …), each row `times` times; itself for 1."""
    return one if times == 1 else one.repeat_interleave(times, dim=0)


def _latents(denoiser: Denoiser, batch: Batch, device: torch.device) -> torch.Tensor:
    """Scaled latents (B, C, h, w), float32: of the batch's pixels, or as the view holds them."""
    drawn = None if batch.posterior_noise is None else batch.posterior_noise.to(device)
    if batch.latents is not None:
        return denoiser.draw_stored(batch.latents.to(device), drawn)
    assert batch.pixels is not None
    return denoiser.encode_images(batch.pixels.to(device), drawn).float()


@contextmanager
def drawn_from(name: str, device: torch.device) -> Iterator[None]:
    """Inside, torch's global generators draw what `name` alone decides; outside, nothing was drawn from them."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "little")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
