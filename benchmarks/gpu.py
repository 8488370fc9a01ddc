"""What a GPU makes of the published architectures, setting by setting: `python -m benchmarks.gpu`, under 8 minutes on 80 GB.

Random weights and synthetic batches, so it needs torch, transformers, diffusers, accelerate and this repository, and neither a
hub nor a dataset. Each row adds a setting to those above it, but for the row that takes SDPA away. The first row is a loop as
IP-Adapter's tutorial_train.py has it (github.com/tencent-ailab/IP-Adapter): float32 weights of the denoiser under autocast
(SDXL's VAE in float32 too), unfused AdamW, a loss fetched at every step. The others are this trainer's own step. A row that
does not fit into memory, or for which no time is left, says so.

FLOPs of an image and what the machine can do with bfloat16 matrices are told as a run's log tells them (`training/flops.py`):
those of the model, of frozen weights no gradient, and nothing twice. `--toy` runs small models on any processor. The last line
is JSON, with the machine's description.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from pipeline.devices import sent
from training.batches import Batch
from training.configuration import SpeedConfig
from training.denoisers.sdxl import SDXL
from training.encoding import Encoder, encodes_ahead
from training.flops import measured_peak, sample_flops
from training.objective import add_noise
from training.parts import Parts, assemble
from training.processes import start_processes
from training.speed import lay_out, set_kernels
from training.step import take_step

from .gpu_models import CASES, Case, build_denoiser, build_language_model, toy

Step = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One setting of one case."""

    case: str
    setting: str
    micro_batch: int
    images_per_second: float | None = None
    first_step: float | None = None
    """Seconds, with what was compiled or searched."""
    memory: float | None = None
    """GiB at most."""
    tflops: float | None = None
    """A second, of those that the setting needs."""
    share: float | None = None
    """Of the machine's."""
    problem: str = ""


class Run:
    """One case on one machine: its models, what is known so far, and the time that is left."""

    def __init__(self, case: Case, device: torch.device, peak: float, seconds: float, until: float) -> None:
        self.case, self.device, self.peak, self.seconds, self.until = case, device, peak, seconds, until
        config = case.training(case.micro_batches[0], SpeedConfig())
        accelerator = start_processes(config)
        language_model = build_language_model(case, config, device)
        self.parts = assemble(config, accelerator, language_model, build_denoiser(case, config, device))
        batches = [case.batch(1, self.parts.denoiser, latents=latents) for latents in (False, True)]
        with accelerator.autocast():
            self.flops, self.flops_of_latents = (sample_flops(self.parts, batch) for batch in batches)
        self.rows: list[Row] = []

    def measure(self, setting: str, micro_batch: int, make: Callable[[], Step], flops: int) -> Row:
        """Times steps as `make` gives them, prints the row and keeps it."""
        row = Row(case=self.case.name, setting=setting, micro_batch=micro_batch)
        late = time.monotonic() > self.until
        row = replace(row, problem="no time left") if late else self._timed(row, make, flops)
        self.rows.append(row)
        print(_line(row, self.rows[0].images_per_second), flush=True)
        return row

    def _timed(self, row: Row, make: Callable[[], Step], flops: int) -> Row:
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        try:
            first, rate = self._rate(make(), row.micro_batch)
            memory = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
            reached = rate * flops
            row = replace(
                row,
                images_per_second=rate,
                first_step=first,
                memory=memory,
                tflops=reached / 1e12,
                share=reached / self.peak,
            )
        except torch.OutOfMemoryError:
            row = replace(row, problem="out of memory")
        self.parts.optimizer.zero_grad()
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
        return row

    def _rate(self, step: Step, size: int) -> tuple[float, float]:
        """Seconds of the first step, and images a second after the second."""
        began = _settled(self.device)
        step()
        first = _settled(self.device) - began
        step()
        began, count = _settled(self.device), 0
        while count < 3 or time.monotonic() - began < self.seconds:
            step()
            count += 1
        return first, count * size / (_settled(self.device) - began)

    def trainer(self, size: int, *, ahead: bool = False, latents: bool = False, features: bool = False) -> Step:
        """The trainer's own step over micro-batches of this size."""
        config = self.case.training(size, SpeedConfig(encode_ahead=ahead))
        parts = replace(self.parts, language_model=_Stored(self.parts, size)) if features else self.parts  # type: ignore[arg-type]
        batches = _endless(self.case, parts, size, latents=latents)
        encoder = Encoder(parts, batches, "0/0", ahead=encodes_ahead(config, parts))
        return lambda: take_step(config, 0, parts, encoder, 1e-4, threading.Event())


class _Stored:
    """A language model's features as read from disk: in the processor's memory, on their way to the GPU."""

    def __init__(self, parts: Parts, size: int) -> None:
        model = parts.language_model
        self.lora = model.lora
        hidden, mask = model.encode([np.ones(model.tokenizer.limit, np.int32)] * size)
        self._kept, self._device = (hidden.cpu(), mask.cpu()), hidden.device

    def encode_where_finite(self, ids: Sequence[np.ndarray], *_: object, **__: object) -> tuple[torch.Tensor, ...]:
        hidden, mask = (sent(one, self._device) for one in self._kept)
        return hidden, mask, torch.ones(len(ids), dtype=torch.bool, device=self._device)


def plain(parts: Parts, batches: Iterator[Batch]) -> Step:
    """A step as IP-Adapter's loop does it."""
    denoiser, accelerator, text = parts.denoiser, parts.accelerator, parts.language_model.module
    optimizer = torch.optim.AdamW(parts.bridge.parameters(), lr=1e-4, weight_decay=0.01)
    device, levels = accelerator.device, denoiser.levels

    def step() -> None:
        batch = next(batches)
        assert batch.pixels is not None
        with torch.no_grad():
            latents = denoiser.vae.encode(batch.pixels.to(device, dtype=denoiser.vae.dtype)).latent_dist.sample()
            latents = latents * denoiser.vae_facts.scaling_factor
            ids = torch.from_numpy(np.stack(batch.ids)).to(device, torch.int64)
            mask = torch.ones_like(ids, dtype=torch.bool)
            hidden = text(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        noise = torch.randn_like(latents)
        times = torch.randint(0, denoiser.steps, (len(latents),), device=device)
        noisy = add_noise(latents, noise, times, levels)
        with accelerator.autocast():
            conditioning = parts.wrapped(hidden, mask, levels.times[times])
            predicted = denoiser.predict(noisy, levels.times[times], conditioning, batch.sizes.to(device))
        loss = F.mse_loss(predicted.float(), noise.float())
        accelerator.gather(loss.repeat(len(latents))).mean().item()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    return step


def run_case(run: Run, compiled: str) -> list[Row]:
    """All rows of one case; the models are changed from row to row."""
    case, parts, flops = run.case, run.parts, run.flops
    online, stored = flops.total, run.flops_of_latents.total
    first, *larger = case.micro_batches
    denoiser = parts.denoiser
    if case.kind is not SDXL:
        denoiser.vae.to(torch.bfloat16)
    run.measure("plain loop, float32 weights", first, lambda: plain(parts, _endless(case, parts, first)), online)
    for module in (denoiser.network, denoiser.vae):
        module.to(torch.bfloat16)
    run.measure("trainer, frozen models in bfloat16", first, lambda: run.trainer(first), online)
    with _without_sdpa(denoiser.network):
        run.measure("(the same, attention without SDPA)", first, lambda: run.trainer(first), online)
    lay_out(SpeedConfig(channels_last=True), denoiser)
    best = run.measure("+ channels_last", first, lambda: run.trainer(first), online)
    for size in larger:
        row = run.measure("+ larger micro-batch", size, lambda size=size: run.trainer(size), online)  # type: ignore[misc]
        best = max(best, row, key=lambda one: one.images_per_second or 0)
    size = best.micro_batch
    set_kernels(SpeedConfig(search_kernels=True))
    run.measure("+ searched kernels", size, lambda: run.trainer(size), online)
    run.measure("+ encoding ahead", size, lambda: run.trainer(size, ahead=True), online)
    if compiled != "off":
        lay_out(SpeedConfig(compile=compiled), denoiser)  # type: ignore[arg-type]
        run.measure(f"+ compiled {compiled}", size, lambda: run.trainer(size, ahead=True), online)
    run.measure("+ stored latents", size, lambda: run.trainer(size, ahead=True, latents=True), stored)
    run.measure(
        "+ stored features", size, lambda: run.trainer(size, ahead=True, latents=True, features=True), flops.training
    )
    return run.rows


def _endless(case: Case, parts: Parts, size: int, *, latents: bool = False) -> Iterator[Batch]:
    return itertools.cycle([case.batch(size, parts.denoiser, latents=latents) for _ in range(2)])


@contextmanager
def _without_sdpa(network: Any) -> Iterator[None]:
    """Inside, attention is two products with all weights between them in memory."""
    from diffusers.models.attention_processor import AttnProcessor

    before = network.attn_processors
    network.set_attn_processor(AttnProcessor())
    try:
        yield
    finally:
        network.set_attn_processor(before)


def _settled(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.monotonic()


def _line(row: Row, plain_rate: float | None) -> str:
    start = f"{row.case:<11} {row.setting:<36} {row.micro_batch:>3}"
    if row.problem:
        return f"{start}  {row.problem}"
    assert row.images_per_second and row.tflops is not None and row.share is not None
    ratio = f"{row.images_per_second / plain_rate:5.2f}" if plain_rate else "    –"
    memory = "    –" if row.memory is None else f"{row.memory:5.1f}"
    return f"{start} {row.images_per_second:8.2f} {ratio} {memory} {row.tflops:8.2f} {row.share:6.1%}"


def machine(device: torch.device, peak: float) -> dict[str, Any]:
    """What a reader must know to compare figures."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else "processor"
    libraries = {library: version(library) for library in ("torch", "transformers", "diffusers", "accelerate")}
    return {"device": name, "cuda": torch.version.cuda, "bf16_peak_tflops": peak / 1e12, **libraries}


def main(given: Sequence[str] | None = None) -> None:
    """Prints the table, and last one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=[case.name for case in CASES])
    parser.add_argument("--seconds", type=float, default=3.0, help="a row is timed for so long")
    parser.add_argument("--deadline", type=float, default=450.0, help="seconds for all cases")
    parser.add_argument("--compile", choices=("off", "transformers", "blocks"), default="transformers")
    parser.add_argument("--toy", action="store_true", help="small models, on any processor")
    options = parser.parse_args(given)
    import diffusers

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.toy:
        raise SystemExit("no GPU here: run it with --toy to see that it works")
    diffusers.utils.logging.set_verbosity_error()
    began = time.monotonic()
    peak = measured_peak(device, torch.bfloat16)
    about = machine(device, peak)
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(
        f"{'case':<11} {'setting':<36} {'  n':>3} {'images/s':>8} {'ratio':>5} {'GiB':>5} {'TFLOP/s':>8} {'share':>6}"
    )
    cases = [case for case in CASES if case.name in options.cases]
    rows: list[Row] = []
    for left, case in zip(range(len(cases), 0, -1), cases, strict=True):
        now = time.monotonic()
        until = now + (began + options.deadline - now) / left
        run = Run(toy(case) if options.toy else case, device, peak, options.seconds, until)
        rows += run_case(run, options.compile)
        run.parts.accelerator.free_memory()
        del run
        torch.backends.cudnn.benchmark = False
        torch._dynamo.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(json.dumps({"machine": about, "seconds": time.monotonic() - began, "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
