"""A stage that must see all partitions: it waits for them, its rows follow them all, and an equal answer stops the wave."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.plan import make_plan
from pipeline.reasons import find_work
from pipeline.runner import run_plan
from pipeline.stage import Columns
from pipeline.storage import Folder
from pipeline.tables import read_table
from stages.ingest import ingest
from tests.small_stages import Choose, Describe, Fetch, Small, SmallConfig, small_source
from tests.test_engine import calls, digests


class Longest(Small):
    """length → the longest of all."""

    name = "longest"
    reads = ("size",)
    writes = pa.schema([("longest", pa.int32())])
    drops = False
    whole = True

    def survey(self, batches: Iterator[pa.Table]) -> None:
        self.most = max((size for batch in batches for size in batch.column("size").to_pylist()), default=0)

    def process(self, batch: pa.Table) -> Columns:
        self.note(batch)
        return {"longest": [self.most] * batch.num_rows}


class Compare(Small):
    """size, longest → how much is missing."""

    name = "compare"
    reads = ("size", "longest")
    writes = pa.schema([("missing", pa.int32())])

    def process(self, batch: pa.Table) -> Columns:
        self.note(batch)
        pairs = zip(batch.column("size").to_pylist(), batch.column("longest").to_pylist())
        return {"missing": [most - size for size, most in pairs]}


def build(dataset: Folder, folder: Path, urls: list[str], runner: str = "local", calls_file: str = "") -> list[int]:
    """Builds, planning again where a stage waits; returns what each row misses."""
    config = SmallConfig(calls=calls_file)
    stages = [Fetch(config), Describe(config), Longest(config), Compare(config), Choose(config)]
    partitions = ingest(dataset, small_source(folder, urls))
    for _ in range(2):
        run_plan(dataset, stages, make_plan(dataset, stages, partitions), lambda _: None, runner=runner)
    plan = make_plan(dataset, stages, partitions)
    assert plan.is_empty
    assert not find_work(dataset, plan)[2].reasons
    tables = [read_table(dataset, t.tables["compare"]) for t in plan.tickets]
    return [n for table in tables for n in table.column("missing").to_pylist()]


def test_every_row_is_held_against_all(tmp_path: Path) -> None:
    urls = [f"http://x/{'a' * n}" for n in (1, 9, 3, 4, 5, 2, 7)]
    longest = max(map(len, urls))
    assert build(Folder(url=str(tmp_path / "d")), tmp_path, urls) == [longest - len(u) for u in urls]


@pytest.mark.parametrize("added,redone", [("aaa", 1), ("a" * 20, 8)])
def test_only_another_answer_goes_on(tmp_path: Path, added: str, redone: int) -> None:
    urls = [f"http://x/{'a' * n}" for n in (1, 9, 3, 4, 5, 2, 7)]
    config, dataset = SmallConfig(calls=str(tmp_path / "calls")), Folder(url=str(tmp_path / "d"))
    build(dataset, tmp_path, urls, calls_file=config.calls)
    calls(config)
    grown = [*urls, f"http://x/{added}b"]
    missing = build(dataset, tmp_path, grown, calls_file=config.calls)
    counted = calls(config)
    assert counted["fetch"] == 1 and counted["longest"] == 8
    assert counted["compare"] == redone
    assert missing == [max(map(len, grown)) - len(u) for u in grown]


def test_on_ray_the_same_bytes(tmp_path: Path) -> None:
    urls = [f"http://x/{'a' * n}" for n in (1, 9, 3, 4, 5, 2, 7, 6, 8)]
    one, other = Folder(url=str(tmp_path / "one")), Folder(url=str(tmp_path / "other"))
    build(one, tmp_path, urls)
    build(other, tmp_path, urls, runner="ray")
    files = [digests(tmp_path / name) for name in ("one", "other")]
    one_files, other_files = ({k: v for k, v in f.items() if not k.startswith("sources/")} for f in files)
    assert one_files == other_files
