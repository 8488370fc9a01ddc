"""How fast samples come: `python -m benchmarks.loader [--samples 512] [--side 512] [--resolution 512] [--rounds 3]`.

The same shards, read in turn, round by round, each by a fresh process that takes as many samples as there are:

  decode      a bare loop over bytes in memory: decode, crop, float32; the floor of any loader that decodes so
  ours n      the trainer's `Batches` with n threads: read at random, crc32, caption, crop, noise of the latents, batch
  webdataset n the same decode and crop by webdataset's `WebLoader` with n worker processes (0: in the loop itself), in the
              order of the shards; no noise, no check

The view's pictures are 3:2 with the shorter side at `--side`; with a smaller `--resolution` each is scaled too. Prints what a
sample costs by part, then images a second and CPU milliseconds an image (medians); last, one line of JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image, ImageFilter

from pipeline.manifest import writing_manifest
from pipeline.pixels import as_array, open_picture, square
from pipeline.shards import ShardWriter, View, ViewInfo, pack_tokens, publish_version
from pipeline.storage import Folder
from training.batches import BatchConfig, Batches
from training.objective import noise_at

BATCH = 32
_MEMBERS = {"image": "jpg", "json": "json", "tokens_t5": "t5.npy"}


def picture(rng: np.random.Generator, side: int) -> bytes:
    """A JPEG of `side` and a half by `side` pixels: coarse colours and fine grain, about as long as a photograph's."""
    size = (side * 3 // 2, side)
    coarse = Image.fromarray(rng.integers(0, 256, (size[1] // 16, size[0] // 16, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), dtype=np.int16)
    grain = (pixels + rng.integers(-12, 13, pixels.shape)).clip(0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(grain).filter(ImageFilter.GaussianBlur(0.7)).save(out, "JPEG", quality=95)
    return out.getvalue()


def make_view(root: Path, samples: int, side: int, shards: int = 4) -> View:
    """The view "photos", in shards of equal length."""
    rng, dataset, folder = np.random.default_rng(0), Folder(url=str(root)), "views/photos-1"
    (root / folder).mkdir(parents=True)
    with writing_manifest(dataset, folder) as manifest:
        for shard, numbers in enumerate(np.array_split(np.arange(samples), shards)):
            name = f"{folder}/{shard}.tar"
            writer, rows = ShardWriter(root / name), []
            for number in numbers.tolist():
                ids = rng.integers(3, 30_000, 60).astype(np.uint16)
                parts = {"image": picture(rng, side), "json": b'{"caption":"a photo"}', "tokens_t5": pack_tokens(ids)}
                writer.write(f"{number:06d}", {_MEMBERS[member]: data for member, data in parts.items()})
                facts = {"key": f"{number:06d}", "shard": name, "width": side * 3 // 2, "height": side}
                rows.append(facts | {f"{member}_crc32": zlib.crc32(data) for member, data in parts.items()})
            places = writer.close()
            for row in rows:
                for member, ending in _MEMBERS.items():
                    row[f"{member}_offset"], row[f"{member}_size"] = places[str(row["key"])][ending]
            manifest.add(pa.Table.from_pylist(rows))
        manifest.close()
        tokenizers = {"t5": {"id": "", "max_length": 128, "captions": [["long", 1.0]]}}
        info = ViewInfo(
            view="photos", version="1", resolution=side, samples=samples, manifest=f"{folder}/manifest.parquet",
            tokenizers=tokenizers,
        )  # fmt: skip
        return View(dataset, publish_version(dataset, info, manifest))


def config_of(samples: int, resolution: int, threads: int) -> BatchConfig:
    """The trainer's settings at SD 1.5's latents."""
    return BatchConfig(
        seed=0, phase=0, resolution=resolution, batch=BATCH, micro_batch=BATCH, tokenizer="t5", empty_ids=(1,),
        latent_shape=(4, resolution // 8, resolution // 8), steps=1000, crop="random", threads=threads,
    )  # fmt: skip


def ours(view: View, resolution: int, threads: int) -> Iterator[int]:
    """Samples in each batch."""
    with Batches([view], config_of(len(view), resolution, threads)) as batches:
        for batch in batches:
            assert not batch.bad
            yield len(batch.keys)


def peer(view: View, resolution: int, workers: int) -> Iterator[int]:
    """Samples in each batch."""
    import webdataset

    shards = [view.dataset.path(shard) for shard in sorted(view.manifest.shards)]
    data = webdataset.WebDataset(
        shards, shardshuffle=False, workersplitter=webdataset.split_by_worker, empty_check=False
    )
    read = data.map(partial(_decoded, resolution=resolution)).batched(BATCH)
    for keys, *_ in webdataset.WebLoader(read.repeat(), batch_size=None, num_workers=workers):
        yield len(keys)


def _decoded(sample: dict[str, bytes], resolution: int) -> tuple[str, np.ndarray, list[int]]:
    pixels = as_array(square(open_picture(sample["jpg"]), resolution))
    return str(sample["__key__"]), pixels, np.load(io.BytesIO(sample["t5.npy"])).tolist()


def bare(view: View, resolution: int, _: int) -> Iterator[int]:
    """One after the other, from memory."""
    data = [view.read(row, "image") for row in range(min(len(view), 4 * BATCH))]
    while True:
        for one in data:
            as_array(square(open_picture(one), resolution))
            yield 1


ARMS: dict[str, Callable[[View, int, int], Iterator[int]]] = {"decode": bare, "ours": ours, "webdataset": peer}
RUNS = (("decode", 0), ("ours", 1), ("ours", 2), ("ours", 4), ("webdataset", 0), ("webdataset", 1), ("webdataset", 2))


def measure(root: Path, arm: str, hands: int, resolution: int) -> tuple[float, float]:
    """Images a second, and CPU milliseconds an image, of as many as the view has; the first batches are not counted."""
    view = View.open(Folder(url=str(root)), "photos")
    stream = ARMS[arm](view, resolution, hands)
    for _ in range(3):
        next(stream)
    wall, cpu, seen = time.perf_counter(), _cpu(), 0
    while seen < len(view):
        seen += next(stream)
    wall, cpu = time.perf_counter() - wall, _cpu() - cpu
    stream.close()  # type: ignore[attr-defined]
    return seen / wall, 1000 * cpu / seen


def _cpu() -> float:
    """Seconds of this process and of children that ended; workers that run yet are asked of the system."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    ticks = sum(sum(map(int, Path(f"/proc/{c}/stat").read_text().rsplit(")", 1)[1].split()[11:13])) for c in children)
    return used.ru_utime + used.ru_stime + ticks / os.sysconf("SC_CLK_TCK")


def parts(view: View, resolution: int) -> dict[str, float]:
    """Milliseconds of CPU that each part of a sample takes, alone on one thread; the least of five rounds."""
    data = [view.read(row, "image") for row in range(16)]
    pictures = [open_picture(one) for one in data]
    squares = [square(one, resolution) for one in pictures]
    shape = (4, resolution // 8, resolution // 8)
    timed: dict[str, Callable[[int], object]] = {
        "read": lambda n: view.read(n, "image"),
        "crc32": lambda n: zlib.crc32(data[n]),
        "decode": lambda n: open_picture(data[n]),
        "crop": lambda n: square(pictures[n], resolution),
        "float32": lambda n: as_array(squares[n]),
        "noise": lambda n: noise_at(0, 0, n, shape),
    }
    return {name: min(_milliseconds(part) for _ in range(5)) for name, part in timed.items()}


def _milliseconds(part: Callable[[int], object]) -> float:
    start = time.thread_time()
    for number in range(16):
        part(number)
    return (time.thread_time() - start) * 1000 / 16


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs=3, metavar=("ROOT", "ARM", "HANDS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        root, arm, hands = options.only
        print(json.dumps(measure(Path(root), arm, int(hands), options.resolution)))
        return
    with tempfile.TemporaryDirectory() as folder:
        view = make_view(Path(folder), options.samples, options.side)
        found: dict[str, list[list[float]]] = {}
        for _ in range(options.rounds):
            for arm, hands in RUNS:
                command = [sys.executable, "-m", "benchmarks.loader", "--resolution", str(options.resolution)]
                done = subprocess.run(
                    [*command, "--only", folder, arm, str(hands)], stdout=subprocess.PIPE, text=True, check=True
                )
                found.setdefault(f"{arm} {hands}", []).append(json.loads(done.stdout.splitlines()[-1]))
        costs = parts(view, options.resolution)
    print("  ".join(f"{name} {value:.2f} ms" for name, value in costs.items()))
    rates = {name: [statistics.median(column) for column in zip(*runs)] for name, runs in found.items()}
    for name, (rate, cpu) in rates.items():
        print(f"{name:14} {rate:8.1f} images/s  {cpu:6.2f} ms of CPU an image")
    print(json.dumps({"side": options.side, "resolution": options.resolution, "parts": costs, "rates": rates}))


if __name__ == "__main__":
    main()
