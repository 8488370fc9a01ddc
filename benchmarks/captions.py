"""Whether the captioner ever waits: `python -m benchmarks.captions [--rows 512] [--rounds 5] [--side 96]`.

The same pictures, captioned by the same model object in three ways, in turn, round by round in one process:

  bare       batches that were decoded and made into tensors beforehand; nothing but the model's own work
  one by one each batch decoded, made into tensors and captioned, before the next
  pipeline   the stage in the pipeline: bytes read from the dataset folder, prompts chosen, answers judged, table written

The model is the shapes world's LLaVA on one torch thread, its pictures as large as the world's recipe stores them. With
`--side 512` decoding one takes a quarter of the time that this tiny model needs for a caption, a far larger share than beside
a real one. Wants two idle cores: one decodes while the other captions. Prints a line a round, a table and,
last, one line of JSON: captions a second (medians), and shares of the bare model's, round by round.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from examples.shapes.making.measure import held_out
from examples.shapes.making.pictures import photo_jpeg
from examples.shapes.recipe import STAGES
from pipeline.engine import StageWorker
from pipeline.plan import Ticket, make_plan
from pipeline.runner import run_plan
from pipeline.sample import sample_key
from pipeline.stage import Columns, Stage
from pipeline.storage import Folder
from stages.captioning.prompts import choose
from stages.captioning.with_transformers import Prepared, TransformersConfig, TransformersEngine
from stages.ingest import ingest
from stages.recaption import Recaption
from stages.source import Source

BATCH = 32


@dataclass(frozen=True, kw_only=True)
class CameraConfig:
    """Where the pictures lie."""

    folder: str
    batch_size: int = 256


class Camera(Stage):
    """url → image: a file of the folder."""

    name = "camera"
    reads = ("url",)
    writes = pa.schema([("sha256", pa.string())])
    payload = {"image": "jpg"}
    config: CameraConfig

    def process(self, batch: pa.Table) -> Columns:
        """Reads the batch's pictures."""
        names = [url.rsplit("/", 1)[1] for url in batch.column("url").to_pylist()]
        return {"image": [(Path(self.config.folder) / n).read_bytes() for n in names], "sha256": names}


def write_pictures(folder: Path, rows: int, side: int) -> None:
    """Photos of the shapes world as JPEG, their short side that many pixels."""
    scenes, rng = held_out(rows, (0, 1, 1, 1))
    for n in range(rows):
        image = Image.open(io.BytesIO(photo_jpeg(scenes, n, rng)))
        scale = side / min(image.size)
        out = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        out.save(folder / f"{n}.jpg", quality=90)


def build_world(folder: Path, rows: int, rounds: int, side: int) -> tuple[StageWorker, list[Ticket]]:
    """A dataset with the pictures in it, a partition for each round and one to warm up; and the recaption stage's worker."""
    pictures = folder / "pictures"
    pictures.mkdir()
    write_pictures(pictures, rows, side)
    urls = [url_of(r, n) for r in range(rounds + 1) for n in range(rows)]
    pq.write_table(pa.table({"url": urls, "text": [""] * len(urls)}), folder / "source.parquet")
    dataset = Folder(url=str(folder / "dataset"))
    partitions = ingest(dataset, Source(path=str(folder / "source.parquet"), partition_size=rows))
    shapes = next(s.config for s in STAGES if isinstance(s, Recaption))
    assert isinstance(shapes.engine, TransformersConfig)
    stages: tuple[Stage, ...] = (
        Camera(CameraConfig(folder=str(pictures))),
        Recaption(replace(shapes, engine=replace(shapes.engine, batch_size=BATCH), batch_size=512)),
    )
    run_plan(dataset, stages[:1], make_plan(dataset, stages[:1], partitions), lambda _: None, runner="local")
    tickets = make_plan(dataset, stages, partitions).tickets
    return StageWorker(dataset, stages, 1, partitions), list(tickets)


def generate_all(engine: TransformersEngine, batches: Sequence[Prepared]) -> None:
    """The model's own work on batches that are ready."""
    for batch in batches:
        engine.generate(batch, [0] * len(batch.rows))


def one_by_one(engine: TransformersEngine, batches: Sequence[tuple[Sequence[bytes], Sequence[str]]]) -> None:
    """Each batch made ready only when the one before is captioned."""
    for images, prompts in batches:
        engine.generate(engine.prepare(images, prompts), [0] * len(images))


def url_of(partition: int, number: int) -> str:
    """The address of a picture in a partition."""
    return f"https://host.example/{partition}/{number}.jpg"


def measure(rows: int, rounds: int, side: int) -> dict[str, list[float]]:
    """Captions a second of the three ways, round by round."""
    import torch

    torch.set_num_threads(1)
    found: dict[str, list[float]] = {"bare": [], "one by one": [], "pipeline": []}
    with tempfile.TemporaryDirectory(prefix="densebridge-benchmark-") as folder:
        worker, tickets = build_world(Path(folder), rows, rounds, side)
        worker.work(tickets[0], lambda _: None)  # loads the model
        stage: Any = worker.stage
        engine: TransformersEngine = stage._engine
        images = [(Path(folder) / "pictures" / f"{n}.jpg").read_bytes() for n in range(rows)]
        windows = [slice(start, start + BATCH) for start in range(0, rows, BATCH)]
        for number, ticket in enumerate(tickets[1:]):
            # The very prompts that the stage will choose: answers in other styles are longer or shorter.
            asked = [choose(stage.config.prompts, sample_key(url_of(number + 1, n))).text for n in range(rows)]
            prepared = [engine.prepare(images[w], asked[w]) for w in windows]
            ways: list[tuple[str, Callable[[], Any]]] = [
                ("bare", partial(generate_all, engine, prepared)),
                ("one by one", partial(one_by_one, engine, [(images[w], asked[w]) for w in windows])),
                ("pipeline", partial(worker.work, ticket, lambda _: None)),
            ]
            turn = number % len(ways)
            for name, way in [*ways[turn:], *ways[:turn]]:
                started = time.perf_counter()
                way()
                found[name].append(rows / (time.perf_counter() - started))
            print(", ".join(f"{name} {speeds[-1]:.1f}/s" for name, speeds in found.items()), flush=True)
    return found


def shares(speeds: Sequence[float], bare: Sequence[float]) -> list[float]:
    """Of the bare model's speed in the same round."""
    return [round(s / b, 4) for s, b in zip(speeds, bare, strict=True)]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512, help="pictures of each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", type=int, default=96, help="shorter side of the pictures in pixels")
    options = parser.parse_args()
    found = measure(options.rows, options.rounds, options.side)
    told = {name: shares(speeds, found["bare"]) for name, speeds in found.items()}
    print(f"\n{'':12}{'captions/s':>12}{'of the bare model (median, least, most)':>44}")
    for name, row in told.items():
        speed = statistics.median(found[name])
        print(f"{name:12}{speed:12.1f}{statistics.median(row):24.1%}{min(row):10.1%}{max(row):10.1%}")
    speeds = {name: round(statistics.median(values), 2) for name, values in found.items()}
    print(json.dumps({"rows": options.rows, "side": options.side, "per_second": speeds, "share_of_bare": told}))


if __name__ == "__main__":
    main()
