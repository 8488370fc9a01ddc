"""How much arithmetic a sample is, and how fast the device can do it: together the share of the machine that a run uses.

The FLOPs are those of the model that is trained, not of a kernel: a multiplication and an addition are two. Of frozen
weights no gradient is made, only of what goes through them, and what lies before the first cross-attention has none at all;
so a step is not three forward passes. What is computed twice to save memory (checkpointing, fused attention's scores)
counts once. Norms, activations and the optimizer, which memory bounds, do not count.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from .batches import Batch
from .encoding import encode
from .fsdp import whole_bridge
from .parts import Parts
from .step import losses_of

_SIDES = (512, 1024, 2048, 4096, 8192)
_SECONDS = 1.0  # that a measurement of the peak may take


@dataclass(frozen=True, kw_only=True)
class SampleFlops:
    """FLOPs of one sample."""

    encoding: int
    """VAE (unless the view has latents) and language models, forwards."""
    training: int
    """Connector and denoiser, forwards and backwards, and backwards through a language model that has a LoRA."""

    @property
    def total(self) -> int:
        """Of a sample that is encoded once for one step."""
        return self.encoding + self.training


def sample_flops(parts: Parts, batch: Batch) -> SampleFlops:
    """Counts what a training step does with one sample as those of `batch`: a pass over one of them, whose gradients go.

    No global random number is drawn, and nothing is changed; all processes must ask at once. Matrix products inside a quantized
    language model's own kernels (8 bits) are not seen.
    """
    bridge = whole_bridge(parts.bridge)
    alone = dataclasses.replace(parts, bridge=bridge, wrapped=bridge)  # the other processes are not waited for
    with torch.compiler.set_stance("force_eager"), _without_checkpointing(parts.denoiser.network):
        with _counter() as of_encoding:
            found = encode(alone, _longest_of(batch), "flops")
        with _counter() as of_training:
            losses_of(alone, found, "flops").sum().backward()
    bridge.zero_grad()
    return SampleFlops(encoding=of_encoding.get_total_flops(), training=of_training.get_total_flops())


@dataclass(frozen=True, kw_only=True)
class Peak:
    """How fast a device can multiply matrices."""

    device: str
    """Its name, the type of the numbers, and what it depends on beside them."""
    flops: float
    """FLOP/s of one device."""
    measured: Literal["measured", "measured before"]


def peak_of(run: Path, device: torch.device, dtype: torch.dtype) -> Peak:
    """The peak that `peak.json` in the run folder has of this device, or a measured one, which is then written there."""
    name = _name_of(device, dtype)
    path = run / "peak.json"
    try:
        known = dict(json.loads(path.read_bytes())) if path.is_file() else {}
    except ValueError:  # half a file, of a crash
        known = {}
    if name in known:
        return Peak(device=name, flops=float(known[name]), measured="measured before")
    flops = measured_peak(device, dtype)
    path.write_text(json.dumps(known | {name: flops}) + "\n")
    return Peak(device=name, flops=flops, measured="measured")


def _name_of(device: torch.device, dtype: torch.dtype) -> str:
    kind = str(dtype).removeprefix("torch.")
    if device.type != "cuda":
        return f"{device.type}, {torch.get_num_threads()} threads, {kind}"
    tf32 = " by TF32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else ""
    return f"{torch.cuda.get_device_name(device)}, {kind}{tf32}"


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of some square matrix products in `dtype`, on this device as it is set (TF32, threads).

    Takes about a second.
    """
    best, began = 0.0, time.monotonic()
    generator = torch.Generator(device).manual_seed(0)
    for side in _SIDES:
        work = 2 * side**3
        if best and time.monotonic() - began + 2 * work / best > _SECONDS:
            break
        one, other = (torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2))
        torch.mm(one, other)  # a library's first call prepares
        for repetitions in (1, 8):
            best = max(best, work * repetitions / _seconds(partial(torch.mm, one, other), repetitions, device))
            if time.monotonic() - began + 8 * work / best > _SECONDS:
                break
    return best


def _seconds(call: Callable[[], object], repetitions: int, device: torch.device) -> float:
    began = _now(device)
    for _ in range(repetitions):
        call()
    return max(_now(device) - began, 1e-9)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _longest_of(batch: Batch) -> Batch:
    """The sample of the longest prompt: to its length the others of a micro-batch are padded."""
    row = max(range(len(batch.ids)), key=lambda one: len(batch.ids[one]))

    def at_row(value: Any) -> Any:
        if not isinstance(value, list | torch.Tensor):
            return value
        each = len(value) // len(batch.ids)  # a sample may be seen at several timesteps
        return value[row * each : (row + 1) * each]

    fields = {one.name: at_row(getattr(batch, one.name)) for one in dataclasses.fields(batch)}
    return dataclasses.replace(batch, **fields | {"bad": []})


def _counter() -> FlopCounterMode:
    aten = torch.ops.aten
    forward = (
        aten._scaled_dot_product_flash_attention,
        aten._scaled_dot_product_flash_attention_for_cpu,
        aten._scaled_dot_product_efficient_attention,
        aten._scaled_dot_product_cudnn_attention,
    )
    backward = (
        aten._scaled_dot_product_flash_attention_backward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward,
        aten._scaled_dot_product_efficient_attention_backward,
        aten._scaled_dot_product_cudnn_attention_backward,
    )
    formulas = {**dict.fromkeys(forward, _attention), **dict.fromkeys(backward, _attention_backward)}
    return FlopCounterMode(display=False, custom_mapping=formulas)


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """(B, heads, Q, width), (B, heads, L, width), (B, heads, L, width): the scores, and the values by them."""
    samples, heads, asking, width = query
    return 2 * samples * heads * asking * key[-2] * (width + value[-1])


def _attention_backward(
    gradient: Sequence[int], query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any
) -> int:
    """Two products for each of the forward pass; the scores that a fused kernel makes again do not count."""
    return 2 * _attention(query, key, value)


@contextmanager
def _without_checkpointing(network: Any) -> Iterator[None]:
    """Inside, a diffusers model keeps its activations: of one sample there is room."""
    on = getattr(network, "is_gradient_checkpointing", False)
    if on:
        network.disable_gradient_checkpointing()
    try:
        yield
    finally:
        if on:
            network.enable_gradient_checkpointing()
