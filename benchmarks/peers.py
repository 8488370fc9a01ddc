"""What img2dataset's incremental mode and Ray Data's checkpointing do for a change; really run, as their pages say.

Each change is made to a copy of the same first result, in the same output folder, and then taken back.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from examples.shapes.source import Row

from .changing_world import Cost, ListName, Measured, World, tally

SHARDS = 6
"""Shards of the original list; as many as we make partitions."""
_COMES_THROUGH = ("ok", "flaky", "redirect", "same_picture", "near_duplicate", "off_world", "tiny")
_SMALL = 32  # pixels, of the changed size


@dataclass(frozen=True, kw_only=True)
class PeerChange:
    """One change, as far as a peer knows it."""

    listed: ListName = "original"
    prompt: str = "Describe the picture."
    """Of the stand-in for a captioner."""
    threshold: float = 0.1
    """Share of the stand-in's captions that the filter drops."""
    small: bool = False
    """Whether pictures are scaled to 32 pixels."""
    hands: int = 8
    """Threads (img2dataset), rows in a batch (Ray Data)."""
    retry: bool = False
    """Whether what failed at first is expected to be there afterwards."""


LISTS = {
    "nothing": PeerChange(),
    "added": PeerChange(listed="added"),
    "removed": PeerChange(listed="removed"),
    "reordered": PeerChange(listed="reordered"),
    "batch": PeerChange(hands=16),
    "retry": PeerChange(retry=True),
}
IMG2DATASET = {**LISTS, "stored_size": PeerChange(small=True)}
RAY_DATA = {**LISTS, "prompt": PeerChange(prompt="List what you see."), "threshold": PeerChange(threshold=0.2)}
_TAKEN_BACK = ("added", "removed", "reordered", "stored_size", "prompt", "threshold")
Apply = Callable[[Path, PeerChange], Measured]


def measure(changes: Mapping[str, PeerChange], folder: Path, apply: Apply) -> dict[str, Cost]:
    """What the first run costs, then each change on a copy of its result, and what taking that back costs."""
    first = folder / "first"
    first.mkdir(parents=True)
    found = {"first": Cost(there=apply(first, PeerChange()))}
    for name, change in changes.items():
        copy = shutil.copytree(first, folder / name)
        there = apply(copy, change)
        found[name] = Cost(there=there, back=apply(copy, PeerChange()) if name in _TAKEN_BACK else None)
        print(f"{folder.name}, {name}: {found[name].there.wrong}", flush=True)
        shutil.rmtree(copy)
    return found


def img2dataset(world: World, folder: Path) -> dict[str, Cost]:
    """Pictures asked for, and the pictures then there, by its own parquet files; `--incremental_mode incremental`."""

    def apply(place: Path, change: PeerChange) -> Measured:
        before = world.asked()
        _run_img2dataset(world, place, change)
        after = world.asked()
        wanted = {world.url + row.path: change.small for row in world.listed(change.listed) if _comes_through(row)}
        flaky = world.failing_at_first()
        found = [
            (row["url"], row["width"] != row["original_width"])
            for file in sorted((place / "out").glob("*.parquet"))
            for row in pq.read_table(file).filter(pc.field("status") == "success").to_pylist()
        ]
        either = set() if change.retry else flaky
        again = sum((after - before)[url] for url in before.keys() - flaky)
        return Measured(work=(after - before).total(), again=again, wrong=tally(wanted, found, either))

    return measure(IMG2DATASET, folder, apply)


def _comes_through(row: Row) -> bool:
    return row.behaviour in _COMES_THROUGH


def _run_img2dataset(world: World, place: Path, change: PeerChange) -> None:
    world.write_list(change.listed, place / "list.parquet")
    settings = {
        "url_list": place / "list.parquet",
        "input_format": "parquet",
        "caption_col": "text",
        "output_folder": place / "out",
        "output_format": "webdataset",
        "number_sample_per_shard": -(-len(world.listed("original")) // SHARDS),
        "processes_count": 1,
        "thread_count": change.hands,
        "retries": 0,
        "resize_mode": "keep_ratio" if change.small else "no",
        "image_size": _SMALL,
        "incremental_mode": "incremental",
    }
    command = [sys.executable, "-m", "img2dataset.main", *(f"--{name}={value}" for name, value in settings.items())]
    quiet = {"NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled"}
    done = subprocess.run(command, env={**os.environ, **quiet}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"img2dataset ended with {done.returncode}: {done.stderr.strip().splitlines()[-1]}")


def ray_data(world: World, folder: Path, *, keep: bool) -> dict[str, Cost]:
    """Pictures captioned by a stand-in, and the captions then there; read, map, filter, write with a CheckpointConfig.

    keep: `delete_checkpoint_on_success=False`, without which a run that ended well leaves no checkpoint.
    """
    for name, value in (("RAY_AUTH_MODE", "disabled"), ("RAY_DATA_LOG_LEVEL", "ERROR")):
        os.environ.setdefault(name, value)
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=256 << 20,
        _node_ip_address="127.0.0.1",
    )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    flaky = world.failing_at_first()

    def apply(place: Path, change: PeerChange) -> Measured:
        before = _captioned(place)
        world.write_list(change.listed, place / "list.parquet")
        _run_ray_data(place, change, flaky, keep)
        done = _captioned(place) - before
        urls = {world.url + row.path for row in world.listed(change.listed)}
        wanted = {url: _caption(change.prompt, url) for url in urls if _score(url) >= change.threshold}
        out = pq.read_table(place / "out", columns=["url", "caption"]).to_pylist()
        found = [(row["url"], row["caption"]) for row in out]
        again = sum(done[url] for url in before.keys() - flaky)
        return Measured(work=done.total(), again=again, wrong=tally(wanted, found, set() if change.retry else flaky))

    try:
        return measure(RAY_DATA, folder, apply)
    finally:
        context.checkpoint_config = None
        ray.shutdown()


def _run_ray_data(place: Path, change: PeerChange, flaky: Set[str], keep: bool) -> None:
    """Rows that fail are left out of the output, so that the checkpoint, too, goes without them."""
    import ray
    from ray.data.checkpoint import CheckpointConfig
    from ray.data.expressions import col

    calls, before = place / "calls", _captioned(place)

    def caption(batch: dict) -> dict:
        urls = [str(url) for url in batch["url"]]
        with calls.open("a") as file:
            file.write("".join(f"{url}\n" for url in urls))
        fine = [url for url in urls if url in before or url not in flaky]
        captions = [_caption(change.prompt, url) for url in fine]
        return {"url": fine, "caption": captions, "score": [_score(url) for url in fine]}

    context = ray.data.DataContext.get_current()
    checkpoint = str(place / "checkpoint")
    context.checkpoint_config = CheckpointConfig("url", checkpoint, delete_checkpoint_on_success=not keep)
    supported = col("score") >= change.threshold
    rows = ray.data.read_parquet(str(place / "list.parquet"), columns=["url"])
    rows.map_batches(caption, batch_size=change.hands).filter(expr=supported).write_parquet(str(place / "out"))


def _captioned(place: Path) -> Counter[str]:
    calls = place / "calls"
    return Counter(calls.read_text().splitlines() if calls.exists() else ())


def _caption(prompt: str, url: str) -> str:
    return f"{prompt} {url}"


def _score(url: str) -> float:
    """A number from 0 to 1 for a picture, the same every time."""
    return int(sha256(url.rsplit("/", 1)[1].encode()).hexdigest()[:8], 16) / 0xFFFFFFFF
