"""Requests counted by hand are those that a store is asked: the same builds against an S3-compatible server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from benchmarks.scale import s3_server
from jobs.costs.requests import OPENED, PAGE, PART, WRITTEN, Requests, gathering, requests_of, upload
from pipeline.funnel import count_funnel
from pipeline.plan import make_plan
from pipeline.runner import run_plan
from pipeline.stage import Columns, Needs, Stage
from pipeline.storage import Folder
from stages.ingest import ingest
from stages.pack import Pack
from stages.publish import companions_of, publish_view
from tests.packing import views_of
from tests.small_stages import Fetch, First, Small, SmallConfig, small_source, small_stages

READS, WRITES = ("GET", "HEAD"), ("PUT", "POST", "LIST")


class Cut(Small):
    """size, of all partitions → the largest."""

    name = "cut"
    reads = ("size",)
    writes = pa.schema([("largest", pa.int32())])
    drops = False
    whole = True

    def survey(self, batches: Iterator[pa.Table]) -> None:
        self.largest = max(max(batch.column("size").to_pylist()) for batch in batches)

    def process(self, batch: pa.Table) -> Columns:
        return {"largest": [self.largest] * batch.num_rows}


@pytest.fixture
def asked() -> Iterator[Counter[str]]:
    """Requests by kind that the bucket `data` was asked."""
    counted: Counter[str] = Counter()
    with s3_server(counted) as (address, _), pytest.MonkeyPatch.context() as patch:
        access = {
            "ENDPOINT_URL": address,
            "ACCESS_KEY_ID": "a",
            "SECRET_ACCESS_KEY": "b",
            "DEFAULT_REGION": "us-east-1",
        }
        for name, value in access.items():
            patch.setenv(f"AWS_{name}", value)
        yield counted


def build(folder: Path, stages: list[Stage], partitions: int, asked: Counter[str]) -> tuple[Requests, Requests]:
    """What a build of so many partitions asked, and what is predicted for its funnel."""
    asked.clear()
    dataset = Folder(url=f"s3://data/{partitions}")
    urls = [f"u://{width}x{40 + n}" for n in range(partitions) for width in (20, 30, 31, 40, 41)]
    made = ingest(dataset, small_source(folder, urls))  # every partition has a picture too small for either view
    while not (plan := make_plan(dataset, stages, made)).is_empty:
        run_plan(dataset, stages, plan, lambda _: None, runner="local")
    for pack in (stage for stage in stages if isinstance(stage, Pack)):
        publish_view(dataset, pack, plan.tickets, companions_of(pack, stages), stages)
    funnel = count_funnel(dataset, stages, plan.tickets)
    found = Requests(reads=sum(asked[kind] for kind in READS), writes=sum(asked[kind] for kind in WRITES))
    assert found.reads + found.writes == asked.total()
    counted = WRITTEN.times(partitions)
    for index, stage in enumerate(stages):
        row = funnel[stage.name]
        counted += requests_of(
            stages, index, partitions=partitions, rows=row.given, keeps_all=row.given == row.kept, tar_bytes=0
        )
    return found, counted


def test_each_further_partition_asks_what_is_counted(tmp_path: Path, asked: Counter[str]) -> None:
    config = SmallConfig()
    stages = [Fetch(config), First(config), Cut(config), *views_of(tmp_path)]
    (few, few_counted), (more, more_counted) = (build(tmp_path, stages, count, asked) for count in (2, 4))
    assert more.reads - few.reads == more_counted.reads - few_counted.reads
    assert more.writes - few.writes == more_counted.writes - few_counted.writes
    assert (
        0 <= more.reads - more_counted.reads < 40 and 0 <= more.writes - more_counted.writes < 120
    )  # whatever the size


def test_bytes_are_asked_for_row_by_row_and_columns_by_table() -> None:
    stages = small_stages(SmallConfig())  # fetch, first (reads head), describe (reads image), choose (reads caption)
    assert [gathering(stages, index, 100) for index in range(4)] == [
        OPENED,
        OPENED.times(3),
        OPENED.times(3) + Requests(reads=100),
        OPENED.times(3),
    ]


def test_large_objects_go_in_parts_and_long_listings_in_pages() -> None:
    assert upload(2 * PART - 1) == Requests(writes=1)
    assert upload(2 * PART) == Requests(writes=4)
    assert upload(2 * PART + 1) == Requests(writes=5)
    stages = small_stages(SmallConfig())
    few, many = (requests_of(stages, 1, partitions=p, rows=p, keeps_all=True, tar_bytes=0) for p in (PAGE, 2 * PAGE))
    assert many == few.times(2) and few.writes == PAGE + 1


def test_every_actor_of_a_whole_stage_looks_at_all_partitions() -> None:
    config = SmallConfig()
    one, three = ([Fetch(config), Cut(SmallConfig(needs=Needs(actors=(1, most))))] for most in (1, 3))
    spent = [requests_of(s, 1, partitions=10, rows=50, keeps_all=True, tar_bytes=0).reads for s in (one, three)]
    assert spent == [2 * 10 * 9, 4 * 10 * 9]
