"""Rows of other settings: judged anew where the stage can tell, shown to it where it remembers; equal to a build from nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.earlier import sibling_folders
from pipeline.plan import Plan, make_plan
from pipeline.reasons import find_work
from pipeline.runner import StageError, run_plan
from pipeline.settings import write_settings
from pipeline.stage import Columns, Needs, Stage
from pipeline.storage import Folder
from pipeline.tables import read_payloads, read_table
from stages.ingest import ingest
from stages.source import Source
from tests.small_stages import small_source


@dataclass(frozen=True, kw_only=True)
class WeighConfig:
    least: int = 0
    refresh: int = 0
    unit: str = "letters"
    server: str = ""
    """A JSON file: by url the version of what is served; what is not named has version 0, -1 does not answer."""
    asked: str = ""
    """A file that gets a line for every row asked for."""
    batch_size: int = 3
    needs: Needs = Needs(cpus=0.25)


class Weigh(Stage):
    """url → image, size, tag; too small ones are dropped without their bytes, as a download does."""

    name = "weigh"
    reads = ("url",)
    writes = pa.schema([("size", pa.int32()), ("tag", pa.int32())])
    payload = {"image": "jpg"}
    revisable = ("refresh", "least")
    remembers = ("tag",)
    not_fingerprinted = ("server", "asked", "batch_size", "needs")
    config: WeighConfig

    def process(self, batch: pa.Table) -> Columns:
        served = json.loads(Path(self.config.server).read_text())
        rows = [self._row(*r, served) for r in zip(*(batch.column(n).to_pylist() for n in ("url", "earlier_tag")))]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def _row(self, url: str, tag: int | None, served: dict[str, int]) -> dict[str, Any]:
        with open(self.config.asked, "a") as file:
            file.write(f"{url} {tag}\n")
        version = served.get(url, 0)
        blank = {"image": None, "size": None, "tag": None, "transient": False}
        if tag == version:
            return {**blank, "status": "unchanged", "reason": None}
        if version < 0:
            return {**blank, "status": "failed", "reason": "timeout", "transient": True}
        row = {"image": f"{url} {version}".encode(), "size": len(url), "tag": version, "transient": False}
        return (
            {**row, **self._judged(len(url))} if len(url) >= self.config.least else {**blank, **self._judged(len(url))}
        )

    def _judged(self, size: int) -> dict[str, Any]:
        small = size < self.config.least
        return {"size": size, "status": "dropped" if small else "kept", "reason": "small" if small else None}

    def revise(self, row: Mapping[str, Any], settings: Mapping[str, Any]) -> Mapping[str, Any] | None:
        if settings["refresh"] < self.config.refresh or row["status"] == "failed":
            return None
        judged = self._judged(row["size"])
        if judged["status"] == "kept" and row["status"] == "dropped":
            return None  # its bytes were not kept
        return {**judged, "tag": row["tag"] if judged["status"] == "kept" else None}


class World:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.urls = [f"http://x/{'a' * (i % 7)}{i}" for i in range(11)]
        self.source = small_source(folder, self.urls)
        self.serve({})

    def serve(self, versions: dict[str, int]) -> None:
        (self.folder / "server").write_text(json.dumps(versions))

    def build(self, dataset: Folder, **changes: Any) -> Plan:
        config = WeighConfig(server=str(self.folder / "server"), asked=str(self.folder / "asked"), **changes)
        stages = [Weigh(config)]
        partitions = ingest(dataset, self.source)
        write_settings(dataset, stages)
        run_plan(dataset, stages, make_plan(dataset, stages, partitions), lambda _: None, runner="local")
        return make_plan(dataset, stages, partitions)

    def asked(self) -> list[str]:
        path = self.folder / "asked"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines

    def fresh(self, dataset: Folder, **changes: Any) -> int:
        """Rows that a plan says would be asked for."""
        stages = [Weigh(WeighConfig(**changes))]
        return find_work(dataset, make_plan(dataset, stages, ingest(dataset, self.source)))[0].fresh


def rows(dataset: Folder, plan: Plan) -> list[dict[str, Any]]:
    """All rows with their bytes in place of where they lie."""
    found = []
    for ticket in plan.tickets:
        table = read_table(dataset, ticket.tables["weigh"])
        there = table.filter(table.column("image_offset").is_valid())
        images = dict(
            zip(there.column("key").to_pylist(), read_payloads(dataset, ticket.tables["weigh"], there, "image"))
        )
        keep = ["key", "status", "reason", "transient", "size", "tag"]
        found += [{**r, "image": images.get(r["key"])} for r in table.select(keep).to_pylist()]
    return found


def content_ids(plan: Plan) -> list[str]:
    return [t.tables["weigh"].content_id for t in plan.tickets]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@settings(max_examples=12, deadline=None)
@given(least=st.lists(st.integers(0, 18), min_size=2, max_size=4))
def test_a_row_that_is_judged_anew_is_what_a_build_from_nothing_makes_of_it(least: list[int]) -> None:
    with TemporaryDirectory() as folder:
        world = World(Path(folder))
        one, sizes = Folder(url=f"{folder}/one"), {url: len(url) for url in world.urls}
        loosest = 99  # the loosest limit under which rows were asked for so far
        for spot, limit in enumerate(least):
            plan = world.build(one, least=limit)
            asked = {line.split()[0] for line in world.asked()}
            fresh = {u for u in world.urls if limit <= sizes[u] < loosest} if spot else set(world.urls)
            assert asked == (fresh if limit not in least[:spot] else set())
            loosest = min(loosest, limit)
            nothing = Folder(url=f"{folder}/nothing-{spot}")
            again = world.build(nothing, least=limit)
            world.asked()
            assert content_ids(plan) == content_ids(again)
            assert rows(one, plan) == rows(nothing, again)


def test_a_refresh_keeps_what_has_not_changed_and_takes_what_has(world: World, tmp_path: Path) -> None:
    dataset = Folder(url=str(tmp_path / "dataset"))
    before = world.build(dataset)
    world.asked()
    first = rows(dataset, before)
    unchanged = world.build(dataset, refresh=1)
    assert sorted(world.asked()) == sorted(f"{url} 0" for url in world.urls)  # each was asked whether it is still tag 0
    assert content_ids(unchanged) == content_ids(before), "nothing after it is redone"
    world.serve({world.urls[4]: 7})
    changed = rows(dataset, world.build(dataset, refresh=2))
    assert [a["key"] for a, b in zip(first, changed) if a != b] == [first[4]["key"]]
    assert changed[4]["image"] == f"{world.urls[4]} 7".encode()
    world.asked()
    assert content_ids(world.build(dataset)) == content_ids(before), "going back finds what was there"
    assert world.asked() == []


def test_a_refresh_and_a_stricter_limit_at_once(world: World, tmp_path: Path) -> None:
    dataset, nothing = Folder(url=str(tmp_path / "dataset")), Folder(url=str(tmp_path / "nothing"))
    world.build(dataset, least=10)
    both = world.build(dataset, least=13, refresh=1)
    assert rows(dataset, both) == rows(nothing, world.build(nothing, least=13, refresh=1))


def test_a_plan_counts_no_row_that_is_judged_anew(world: World, tmp_path: Path) -> None:
    dataset = Folder(url=str(tmp_path / "dataset"))
    plan = world.build(dataset, least=12)
    kept = sum(t.tables["weigh"].kept for t in plan.tickets)
    assert 0 < kept < len(world.urls)
    assert world.fresh(dataset, least=14) == len(world.urls) - kept  # at most these: the others were kept
    assert world.fresh(dataset, least=12, refresh=1) == len(world.urls)
    assert world.fresh(dataset, least=12, unit="words") == len(world.urls)


def test_another_setting_is_no_sibling(world: World, tmp_path: Path) -> None:
    dataset = Folder(url=str(tmp_path / "dataset"))
    world.build(dataset)
    world.asked()
    world.build(dataset, unit="words")
    assert len(sibling_folders(dataset, Weigh(WeighConfig()))) == 1
    assert all(line.endswith("None") for line in world.asked()), "its rows are neither taken over nor shown"


def test_failed_rows_are_asked_again_under_other_settings(world: World, tmp_path: Path) -> None:
    dataset = Folder(url=str(tmp_path / "dataset"))
    world.serve({world.urls[2]: -1})
    world.build(dataset)
    world.serve({})
    world.asked()
    world.build(dataset, least=1)
    assert world.asked() == [f"{world.urls[2]} None"]


def test_unchanged_without_an_earlier_row_is_refused(world: World, tmp_path: Path) -> None:
    class Sleepy(Weigh):
        def _row(self, url: str, tag: int | None, served: dict[str, int]) -> dict[str, Any]:
            return {"image": None, "size": None, "tag": None, "status": "unchanged", "reason": None, "transient": False}

    dataset = Folder(url=str(tmp_path / "dataset"))
    stages = [Sleepy(WeighConfig())]
    stages[0].config = WeighConfig(server=str(world.folder / "server"))
    partitions = ingest(dataset, Source(path=world.source.path, partition_size=5))
    with pytest.raises(StageError, match="unchanged"):
        run_plan(dataset, stages, make_plan(dataset, stages, partitions), lambda _: None, runner="local")
