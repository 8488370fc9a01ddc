"""What the trainer costs beside a bare loop: `python -m benchmarks.train_step [--steps 20] [--rounds 7] [--threads 1]`.

The shapes world's models and pictures, on one core and the loader's threads. In one process, in turn, round by round:

  ours       `take_step` over `Batches`: reads tars at random, checks, crops, draws by position, counts what is bad
  step       `take_step` over batches in memory
  bare       the same modules, loss and optimizer written down by hand: no accelerate, no loader, all tensors in memory
  diffusers  a loop in the style of diffusers' examples/text_to_image/train_text_to_image.py, for a connector in place of the
             U-Net: a DataLoader over a map of pictures and captions, `accelerate`, noise by torch.randn, a scheduler, a
             progress bar with the loss; captions are padded to the longest as ours are, not to 128 as there
  loader     `Batches` alone

Prints milliseconds a step, and the medians of the rounds' ratios; last, one line of JSON. Aims: ours is at least 0.97 times as
fast as bare, and the loader gives at least three times what the step consumes.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch.nn import functional as F

from examples.shapes.making.pictures import as_seen
from examples.shapes.recipe import T5, T5_MODEL, TSC, training
from examples.shapes.words import dense_caption
from examples.shapes.world import draw_scenes
from pipeline.captions import load_tokenizer
from pipeline.manifest import writing_manifest
from pipeline.pixels import as_array, open_picture, square
from pipeline.shards import ShardWriter, View, ViewInfo, pack_tokens, publish_version
from pipeline.storage import Folder
from training.batches import Batch, BatchConfig, Batches
from training.bridge import Bridge
from training.configuration import Phase, TrainingConfig
from training.encoding import Encoder
from training.objective import add_noise, target_of
from training.parts import Parts, batch_config, load_parts
from training.processes import start_processes
from training.step import take_step

SIDE, RATE = 24, 1e-3
_MEMBERS = {"image": "jpg", "json": "json", "tokens_t5": "t5.npy"}
RATIOS = {
    "ours_to_bare": ("bare", "ours"),
    "step_to_bare": ("bare", "step"),
    "ours_to_diffusers": ("diffusers", "ours"),
    "loader_to_step": ("ours", "loader"),
}
"""How fast the first is beside the second: seconds of one over those of the other."""
Run = Callable[[int], object]
"""Takes so many steps."""


def make_view(root: Path, samples: int) -> tuple[View, list[tuple[bytes, str]]]:
    """Shapes of two and three objects with dense captions, packed; and the same pictures and captions in memory."""
    rng, dataset, folder = np.random.default_rng(0), Folder(url=str(root)), "views/shapes-1"
    (root / folder).mkdir(parents=True)
    scenes = draw_scenes(rng, samples, (0, 0.5, 0.5))
    tokenizer, kept, rows = load_tokenizer(T5), [], []
    writer = ShardWriter(root / folder / "0.tar")
    for number, pixels in enumerate(as_seen(scenes, rng, SIDE)):
        picture = io.BytesIO()
        Image.fromarray(pixels).save(picture, "JPEG", quality=98, subsampling=0)
        caption = dense_caption(scenes.facts(number), rng)
        ids = tokenizer.tokenize([caption])[0].astype(np.uint16)
        parts = {
            "image": picture.getvalue(),
            "json": json.dumps({"caption": caption}).encode(),
            "tokens_t5": pack_tokens(ids),
        }
        writer.write(f"{number:06d}", {_MEMBERS[member]: data for member, data in parts.items()})
        rows.append({"key": f"{number:06d}", "shard": f"{folder}/0.tar", "width": SIDE, "height": SIDE})
        kept.append((picture.getvalue(), caption))
    places = writer.close()
    for row in rows:
        for member, ending in _MEMBERS.items():
            row[f"{member}_offset"], row[f"{member}_size"] = places[str(row["key"])][ending]
    with writing_manifest(dataset, folder) as manifest:
        manifest.add(pa.Table.from_pylist(rows))
        manifest.close()
        info = ViewInfo(
            view="shapes",
            version="1",
            resolution=SIDE,
            samples=samples,
            manifest=f"{folder}/manifest.parquet",
            tokenizers={"t5": {"id": "", "max_length": T5.max_length, "captions": [["long", 1.0]]}},
        )
        return View(dataset, publish_version(dataset, info, manifest)), kept


def config_of(batch: int, threads: int) -> TrainingConfig:
    """The shapes recipe's TSC, at one resolution."""
    phase = Phase(view="shapes", resolution=SIDE, samples=batch, batch=batch, micro_batch=batch, rate=RATE)
    return replace(training(TSC, T5_MODEL), phases=(phase,), threads=threads, caption_drop=0.0)


def ours(config: TrainingConfig, parts: Parts, batches: Iterator[Batch]) -> Run:
    """The trainer's step, over batches from its loader or in memory."""
    encoder, asked = Encoder(parts, batches, "0/0", ahead=False), threading.Event()

    def run(steps: int) -> None:
        for _ in range(steps):
            assert not take_step(config, 0, parts, encoder, RATE, asked).skipped

    return run


def bare(config: TrainingConfig, parts: Parts, given: Sequence[Batch]) -> Run:
    """By hand, over batches in memory."""
    denoiser, text, levels = parts.denoiser, parts.language_model.module, parts.denoiser.levels
    bridge = Bridge(config.connector)
    optimizer = torch.optim.AdamW(bridge.parameters(), lr=RATE, betas=config.betas, weight_decay=config.weight_decay)
    ready = itertools.cycle([(batch, *_padded(batch.ids, parts.language_model.pad)) for batch in given])

    def run(steps: int) -> None:
        for batch, ids, mask in itertools.islice(ready, steps):
            with torch.no_grad():
                assert batch.pixels is not None
                latents = denoiser.encode_images(batch.pixels, batch.posterior_noise)
                hidden = text(input_ids=ids, attention_mask=mask.long()).last_hidden_state
            times = levels.times[batch.timesteps]
            noisy = add_noise(latents, batch.noise, batch.timesteps, levels)
            predicted = denoiser.predict(noisy, times, bridge(hidden, mask, times))
            loss = F.mse_loss(predicted, target_of(latents, batch.noise, batch.timesteps, levels))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(bridge.parameters(), config.clip or float("inf"))
            optimizer.step()
            optimizer.zero_grad()

    return run


def diffusers_style(config: TrainingConfig, parts: Parts, samples: Sequence[tuple[bytes, str]]) -> Run:
    """As train_text_to_image.py trains a U-Net, with its defaults: the data is read in the loop's own process."""
    from accelerate import Accelerator
    from diffusers import DDIMScheduler
    from diffusers.optimization import get_scheduler
    from tqdm.auto import tqdm

    accelerator, pad = Accelerator(gradient_accumulation_steps=1), parts.language_model.pad
    denoiser, text, tokenizer = parts.denoiser, parts.language_model.module, parts.language_model.tokenizer
    noises = DDIMScheduler.from_config(denoiser.scheduler)

    def collate(examples: list[tuple[bytes, str]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        pixels = [torch.from_numpy(as_array(square(open_picture(picture), SIDE))) for picture, _ in examples]
        return torch.stack(pixels), *_padded(tokenizer.tokenize([caption for _, caption in examples]), pad)

    bridge: Any = Bridge(config.connector)
    optimizer: Any = torch.optim.AdamW(
        bridge.parameters(), lr=RATE, betas=config.betas, weight_decay=config.weight_decay
    )
    loader: Any = torch.utils.data.DataLoader(
        samples,  # type: ignore[arg-type]
        shuffle=True,
        collate_fn=collate,
        batch_size=config.phases[0].batch,
        drop_last=True,
    )
    bridge, optimizer, loader, rates = accelerator.prepare(
        bridge, optimizer, loader, get_scheduler("constant", optimizer)
    )
    endless = itertools.chain.from_iterable(itertools.repeat(loader))

    def run(steps: int) -> None:
        shown = tqdm(total=steps, file=io.StringIO())
        for pixels, ids, mask in itertools.islice(endless, steps):
            with accelerator.accumulate(bridge):
                with torch.no_grad():
                    latents = denoiser.encode_images(pixels)
                noise = torch.randn_like(latents)
                times = torch.randint(0, denoiser.steps, (len(latents),), device=latents.device)
                noisy = noises.add_noise(latents, noise, times)
                hidden = text(input_ids=ids, attention_mask=mask.long())[0]
                kind = noises.config.prediction_type
                target = noise if kind == "epsilon" else noises.get_velocity(latents, noise, times)
                predicted = denoiser.predict(noisy, times, bridge(hidden, mask, times))
                loss = F.mse_loss(predicted.float(), target.float(), reduction="mean")
                accelerator.gather(loss.repeat(len(latents))).mean().item()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(bridge.parameters(), config.clip)
                optimizer.step()
                rates.step()
                optimizer.zero_grad()
            shown.update(1)
            shown.set_postfix(loss=loss.detach().item(), lr=rates.get_last_lr()[0])

    return run


def _padded(ids: Sequence[np.ndarray], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (B, L) and which are no pads."""
    length = max(len(one) for one in ids)
    padded = np.stack([np.pad(one.astype(np.int64), (0, length - len(one)), constant_values=pad) for one in ids])
    return torch.from_numpy(padded), torch.from_numpy(np.arange(length) < np.array([[len(one)] for one in ids]))


def loader(view: View, config: BatchConfig) -> Run:
    """The batches alone, from a cold start each time."""

    def run(steps: int) -> None:
        with Batches([view], config) as batches:
            for _ in itertools.islice(batches, steps):
                pass

    return run


def measure(loops: dict[str, Run], steps: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds a step of each loop by the clock and of the processor (all threads), a pair a round; in every round another one
    comes first.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in loops}
    for run in loops.values():
        run(2)
    names = list(loops)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            began = time.perf_counter(), time.process_time()
            loops[name](steps)
            ended = time.perf_counter(), time.process_time()
            found[name].append(((ended[0] - began[0]) / steps, (ended[1] - began[1]) / steps))
    return found


def summary(found: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """Medians, and of each ratio that of the rounds with the smallest and the largest; `cpu` is by the processor's time."""
    told: dict[str, Any] = {}
    for clock, number in (("wall", 0), ("cpu", 1)):
        seconds = {name: [pair[number] for pair in pairs] for name, pairs in found.items()}
        told[clock] = {"seconds_a_step": {name: statistics.median(each) for name, each in seconds.items()}}
        for name, (one, other) in RATIOS.items():
            paired = sorted(a / b for a, b in zip(seconds[one], seconds[other], strict=True))
            told[clock][name] = [statistics.median(paired), paired[0], paired[-1]]
    return told


def main(given: Sequence[str] | None = None) -> None:
    """Prints the table, and last one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=960)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--steps", type=int, default=20, help="of each loop in a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of the loader")
    options = parser.parse_args(given)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        view, samples = make_view(Path(folder), options.samples)
        config = config_of(options.batch, options.threads)
        parts = load_parts(config, start_processes(config))
        reading = batch_config(config, 0, parts)
        with Batches([view], reading) as batches:
            kept = list(itertools.islice(batches, max(1, options.samples // options.batch)))
            assert not any(batch.bad for batch in kept)
        loops = {"bare": bare(config, parts, kept), "diffusers": diffusers_style(config, parts, samples)}
        loops["loader"] = loader(view, reading)
        loops["step"] = ours(config, parts, itertools.cycle(kept))
        with Batches([view], reading) as for_steps:
            loops["ours"] = ours(config, parts, for_steps)
            found = summary(measure(loops, options.steps, options.rounds))
    for clock, told in found.items():
        for name, seconds in told["seconds_a_step"].items():
            print(f"{clock:<5} {name:<18} {1000 * seconds:8.2f} ms a step")
        for name in RATIOS:
            median, least, most = told[name]
            print(f"{clock:<5} {name:<18} {median:8.3f} [{least:.3f}, {most:.3f}]")
    print(json.dumps(found | {"samples": options.samples, "batch": options.batch, "threads": options.threads}))


if __name__ == "__main__":
    main()
