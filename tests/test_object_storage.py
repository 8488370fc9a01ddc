"""The whole shapes build in a store of objects with bad moments: what ends up there is what it is on a disk, byte for byte.

`benchmarks/object_storage.py` does it with more rows and on Ray.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.object_storage import digests
from benchmarks.unreliable_store import FAULTS, unreliable_store
from examples.shapes import recipe as shapes
from examples.shapes.server import serve
from examples.shapes.source import ShapesSource, write_source
from jobs.build import BuildOptions, build
from pipeline.shards import View
from pipeline.storage import Folder
from stages.captioning.engine import Answer
from stages.captioning.with_transformers import TransformersEngine
from stages.source import Source
from training.shard_cache import open_shards

ROWS = 16


def saying_it_again(captions: Callable[..., list[Answer]]) -> Callable[..., list[Answer]]:
    """The captioner, which takes most of the time, says the second time what it said of these pictures the first time."""
    said: dict[tuple[bytes, ...], list[Answer]] = {}

    def saying(engine: object, images: Sequence[bytes], prompts: Sequence[str], seeds: Sequence[int]) -> list[Answer]:
        if (*images,) not in said:
            said[(*images,)] = captions(engine, images, prompts, seeds)
        return said[(*images,)]

    return saying


@pytest.fixture(scope="module")
def struck() -> Counter[str]:
    """How many requests had a bad moment, by kind."""
    return Counter()


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory, struck: Counter[str]) -> Iterator[tuple[Folder, Folder]]:
    """The same build on this machine's disk and in the store."""
    folder, source = tmp_path_factory.mktemp("shapes"), ShapesSource(count=ROWS, slow=0.0)
    places = (str(folder / "dataset"), "s3://data/shapes")
    with (
        serve(source) as url,
        unreliable_store(7, 0.2, struck) as (variables, _),
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in variables.items():
            patch.setenv(name, value)
        patch.setattr(TransformersEngine, "captions", saying_it_again(TransformersEngine.captions))
        write_source(source, url, folder / "source.parquet")
        given = Source(path=str(folder / "source.parquet"), partition_size=ROWS)
        for place in places:
            build(replace(shapes.recipe, dataset=place, source=given), BuildOptions(runner="local"))
        yield Folder(url=places[0]), Folder(url=places[1])


def test_the_bytes_are_those_on_a_disk(datasets: tuple[Folder, Folder], struck: Counter[str]) -> None:
    here, there = map(digests, datasets)
    assert here == there and len(here) > 20
    assert all(struck[fault] > 3 for fault in FAULTS)


def test_the_trainer_reads_the_same_samples(datasets: tuple[Folder, Folder], tmp_path: Path) -> None:
    """By requests, and from copies."""
    here, there = (View.open(dataset, "16") for dataset in datasets)
    assert len(here) == len(there) > 5 and here.info == there.info
    members = ("image", "json", "tokens_t5", "tokens_clip")
    for cache in (None, str(tmp_path)):
        shards = open_shards([there], cache, 1.0)
        for row in range(len(there)):
            for member in members:
                place = there.place(row, member)
                assert place and shards.read(*place) == here.read(row, member)
        shards.close()
