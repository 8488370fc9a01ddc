"""Speed and memory of the download stage, beside img2dataset: `python -m benchmarks.download --images 5000 --passes 2`.

A server in a process of its own serves photographs of 0.3 to 3 megapixels (made here: spectra as natural pictures have them,
edges, usual qualities; a few hundred distinct ones under as many URLs as wanted) on the loopback interface. The stage, in a
real build of one stage with the local runner, and img2dataset fetch them in turn, each in a process of its own: to 512
pixels on the shorter side, only where they are larger, area interpolation, quality 95, as tars; 16 requests at a time.
What counts is the CPU time of each one's process and of all that it started, without the server's: pictures for each second
of a core. Beside it the same without what ten pictures take, which is imports and leaves the pictures alone; and the wall
clock, which on few cores is the server's too.

With `--memory 100000` instead: the memory of the stage and its decoders while it fetches so many small pictures.
Prints tables and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

EDGE, QUALITY, THREADS, WARM = 512, 95, 16, 10
PEERS = ("densebridge", "img2dataset")
SHAPES = ((4, 3), (3, 2), (16, 9), (1, 1), (3, 4), (2, 3))


def make_photos(folder: Path, count: int, megapixels: tuple[float, float]) -> None:
    """JPEGs whose areas are spread evenly between these; 1.5 to 3 bits a pixel, as cameras and websites have them."""
    rng = np.random.default_rng(0)
    textures = [_texture(rng, 2400) for _ in range(6)]
    folder.mkdir()
    for number in range(count):
        area = rng.uniform(*megapixels) * 1e6
        across, down = SHAPES[rng.integers(len(SHAPES))]
        width, height = (round((area * a / b) ** 0.5) for a, b in ((across, down), (down, across)))
        left, top = rng.integers(2400 - min(width, 2399)), rng.integers(2400 - min(height, 2399))
        texture = Image.fromarray(textures[rng.integers(len(textures))]).crop((left, top, left + width, top + height))
        _draw(texture, rng)
        quality, progressive = int(rng.choice([85, 90, 92, 95])), bool(rng.random() < 0.15)
        texture.save(folder / f"{number}.jpg", quality=quality, progressive=progressive)


def _texture(rng: np.random.Generator, side: int) -> np.ndarray:
    """Colours whose amplitude falls as one over the frequency (Field, 1987, and a lens), mostly grey."""
    waves = np.fft.rfft2(rng.standard_normal((side, side, 3)), axes=(0, 1))
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = 1
    found = np.fft.irfft2(waves / (frequency**1.35)[..., None], s=(side, side), axes=(0, 1))
    grey = found.mean(axis=-1, keepdims=True)
    found = grey + 0.4 * (found - grey)
    return (found / found.std() * 48 + 120).clip(0, 255).astype(np.uint8)


def _draw(picture: Image.Image, rng: np.random.Generator) -> None:
    draw = ImageDraw.Draw(picture)
    for _ in range(20):
        left, top, size = (
            int(rng.integers(low, high))
            for low, high in ((0, picture.width), (0, picture.height), (9, picture.width // 4))
        )
        colour = tuple(int(c) for c in rng.integers(256, size=3))
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        fill = colour if rng.random() < 0.5 else None
        shape([left, top, left + size, top + size // 2], fill=fill, outline=colour, width=int(rng.integers(1, 6)))


class Photos(BaseHTTPRequestHandler):
    """Answers /<anything>-<number>.jpg with that photograph."""

    protocol_version = "HTTP/1.1"
    files: list[bytes] = []

    def do_GET(self) -> None:
        """One photograph."""
        body = self.files[int(self.path.rsplit("-", 1)[1].removesuffix(".jpg"))]
        self.send_response(200)
        self.send_header("Content-Type", "image/jpeg")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


def serve(folder: str) -> None:
    """A process of its own: prints its address and serves until it is ended."""
    names = sorted(Path(folder).iterdir(), key=lambda p: int(p.stem))
    Photos.files = [p.read_bytes() for p in names]
    with ThreadingHTTPServer(("127.0.0.1", 0), Photos) as server:
        print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
        server.serve_forever()


def densebridge(table: str, out: str, told: int = 0) -> None:
    """One build of one stage. `told`: prints the memory of this process and its children after each so many rows."""
    from pipeline.compute import Progress
    from pipeline.plan import make_plan
    from pipeline.runner import run_plan
    from pipeline.storage import Folder
    from stages.download import Download, DownloadConfig
    from stages.fetch import FetchConfig
    from stages.ingest import ingest
    from stages.source import Source

    fetch = FetchConfig(
        allow_private_hosts=True,
        concurrency=THREADS,
        per_host=THREADS,
        per_host_rate=1e6,  # the one host is ours
        site_files=(),
        timeout=60.0,
    )
    stage = Download(DownloadConfig(fetch=fetch, min_edge=64, max_edge=EDGE, quality=QUALITY))
    dataset, rows = Folder(url=out), 0

    def report(progress: Progress) -> None:
        nonlocal rows
        before, rows = rows, rows + progress.rows
        if told and before // told != rows // told:
            me = psutil.Process()
            sizes = [process.memory_info().rss >> 20 for process in (me, *me.children(recursive=True))]
            print(json.dumps({"rows": rows, "stage_mb": sizes[0], "decoders_mb": sum(sizes[1:])}), flush=True)

    partitions = ingest(dataset, Source(path=table))
    run_plan(dataset, [stage], make_plan(dataset, [stage], partitions), report, runner="local")


def img2dataset(table: str, out: str) -> None:
    """The same by img2dataset's own main function."""
    os.environ |= {"NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled"}
    from img2dataset import download

    download(
        url_list=table,
        input_format="parquet",
        url_col="url",
        caption_col="text",
        output_folder=out,
        output_format="webdataset",
        image_size=EDGE,
        resize_mode="keep_ratio",
        resize_only_if_bigger=True,
        encode_quality=QUALITY,
        skip_reencode=True,
        extract_exif=False,
        processes_count=1,
        thread_count=THREADS,
        number_sample_per_shard=5000,
        timeout=60,
    )


def measure(peer: str, url: str, images: int, distinct: int, folder: Path) -> dict[str, float]:
    """Runs one peer in a process of its own: pictures that came out, seconds, CPU seconds of it and all it started."""
    table, out = folder / f"{peer}-{images}.parquet", folder / f"{peer}-{images}"
    write_list(table, url, images, distinct)
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "benchmarks.download", "--child", peer, str(table), str(out)],
                          capture_output=True, text=True, check=False)  # fmt: skip
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{peer} ended with {done.returncode}: {done.stderr.strip().splitlines()[-1]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    tables = [p for p in out.rglob("*.parquet") if peer == "img2dataset" or p.parent.name.startswith("download-")]
    statuses = [
        s for p in tables if "records" not in str(p) for s in pq.read_table(p, columns=["status"])["status"].to_pylist()
    ]
    came = sum(status in ("kept", "success") for status in statuses)
    if came != images:
        raise RuntimeError(f"{peer}: {came} of {images} pictures came")
    subprocess.run(["rm", "-r", str(out)], check=True)
    return {"images": images, "wall": wall, "cpu": cpu}


def write_list(path: Path, url: str, images: int, distinct: int) -> None:
    """A source of as many URLs."""
    urls = [f"{url}/{number}-{number % distinct}.jpg" for number in range(images)]
    pq.write_table(pa.table({"url": urls, "text": ["a photograph"] * images}), path)


def compare(url: str, images: int, distinct: int, passes: int, folder: Path) -> dict[str, Any]:
    """All passes, in turn; the figures are each one's median."""
    found: dict[str, list[dict[str, float]]] = {peer: [] for peer in PEERS}
    print(f"{'':>12} {'images':>7} {'wall s':>7} {'CPU s':>7} {'images/CPU s':>13} {'without start':>14}")
    for _ in range(passes):
        for peer in PEERS:
            start, whole = (measure(peer, url, count, distinct, folder) for count in (WARM, images))
            row = {"cpu": whole["cpu"], "wall": whole["wall"], "per_core": images / whole["cpu"]}
            row["per_core_without_start"] = (images - WARM) / (whole["cpu"] - start["cpu"])
            found[peer].append(row)
            print(
                f"{peer:>12} {images:>7} {row['wall']:>7.1f} {row['cpu']:>7.1f} {row['per_core']:>13.1f} "
                f"{row['per_core_without_start']:>14.1f}",
                flush=True,
            )
    medians = {
        peer: {name: round(float(np.median([r[name] for r in rows])), 2) for name in rows[0]}
        for peer, rows in found.items()
    }
    ours, theirs = (medians[peer] for peer in PEERS)
    ratios = {f"ratio_{name}": round(ours[name] / theirs[name], 2) for name in ("per_core", "per_core_without_start")}
    return {"images": images, "passes": passes, **ratios, **medians}


def watch_memory(url: str, images: int, distinct: int, folder: Path) -> dict[str, Any]:
    """Memory after each tenth."""
    table = folder / "list.parquet"
    write_list(table, url, images, distinct)
    command = ["--child", "densebridge", str(table), str(folder / "out"), str(images // 10)]
    told = []
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.download", *command], stdout=subprocess.PIPE, text=True
    ) as child:
        print(f"{'rows':>8} {'stage MB':>9} {'decoders MB':>12}")
        for line in child.stdout or ():
            told.append(json.loads(line))
            print(f"{told[-1]['rows']:>8} {told[-1]['stage_mb']:>9} {told[-1]['decoders_mb']:>12}", flush=True)
    return {"images": images, "memory": told}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--distinct", type=int, default=300, help="photographs that are made")
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--memory", type=int, default=0, help="watch the memory over so many URLs instead")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        return serve(given.serve)
    if given.child:
        peer, table, out, *told = given.child
        return img2dataset(table, out) if peer == "img2dataset" else densebridge(table, out, *map(int, told))
    with tempfile.TemporaryDirectory(prefix="densebridge-benchmark-") as name:
        folder = Path(name)
        make_photos(folder / "photos", given.distinct, (0.07, 0.1) if given.memory else (0.3, 3.0))
        command = [sys.executable, "-m", "benchmarks.download", "--serve", str(folder / "photos")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
            url = server.stdout.readline().strip() if server.stdout else ""
            try:
                if given.memory:
                    told = watch_memory(url, given.memory, given.distinct, folder)
                else:
                    told = compare(url, given.images, given.distinct, given.passes, folder)
            finally:
                server.terminate()
    print(json.dumps({"benchmark": "download", **told}))


if __name__ == "__main__":
    main()
