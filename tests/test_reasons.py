"""What a plan says of each kind of change, from names alone: why, how many rows are new, how many are taken over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.plan import make_plan
from pipeline.reasons import Work, find_work
from pipeline.runner import run_plan
from pipeline.sample import sample_key
from pipeline.settings import write_settings
from pipeline.stage import Stage
from pipeline.storage import Folder
from pipeline.takedown import take_down
from pipeline.tombstones import Tombstones
from stages.ingest import ingest, preview
from stages.source import Source
from tests.small_stages import Describe, SmallConfig, small_source, small_stages, urls

CONFIG = SmallConfig()


class Build:
    """A dataset of 12 rows in three partitions, and what a plan says of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.dataset = folder, Folder(url=str(folder / "data"))
        self.source = small_source(folder, urls(12))

    def run(self, stages: Sequence[Stage], source: Source | None = None) -> None:
        write_settings(self.dataset, stages)
        plan = make_plan(self.dataset, stages, ingest(self.dataset, source or self.source))
        run_plan(self.dataset, stages, plan, lambda _: None, runner="local")

    def work(self, stages: Sequence[Stage], *, retry: bool = False) -> dict[str, Work]:
        plan = make_plan(self.dataset, stages, preview(self.dataset, self.source), retry=retry)
        return {w.stage.name: w for w in find_work(self.dataset, plan)}

    def reasons(self, stages: Sequence[Stage]) -> dict[str, dict[str, int]]:
        return {name: work.reasons for name, work in self.work(stages).items() if work.reasons}


@pytest.fixture
def built(tmp_path: Path) -> Build:
    build = Build(tmp_path)
    build.run(small_stages(CONFIG))
    return build


def test_nothing_has_no_reason(built: Build) -> None:
    assert not built.reasons(small_stages(CONFIG))


def test_before_the_first_build_all_rows_are_new(tmp_path: Path) -> None:
    build = Build(tmp_path)
    work = build.work(small_stages(CONFIG))
    assert all(w.reasons == {"new rows": 3} and w.fresh == w.rows == 12 for w in work.values())
    assert not build.dataset.list("partitions")


def test_more_rows_are_new_where_they_are(built: Build) -> None:
    built.source = small_source(built.folder, [*urls(12), "u://new/1", "u://new/2"])
    work = built.work(small_stages(CONFIG))
    assert all(w.reasons == {"new rows": 1} and (w.fresh, w.up_to_date) == (2, 3) for w in work.values())


def test_a_setting_is_named_with_both_values(built: Build) -> None:
    changed = small_stages(CONFIG, describe=replace(CONFIG, suffix="!"))
    assert built.reasons(changed) == {
        "describe": {'changed setting: suffix "" → "!"': 3},
        "choose": {"after describe": 3},
    }
    work = built.work(changed)
    assert work["choose"].fresh == work["choose"].rows == work["describe"].fresh > 0


def test_a_condition_before_a_stage_lets_it_take_its_rows_over(built: Build) -> None:
    """Fewer go on, and of those all values are there."""
    after = type("After", (Describe,), {"name": "after", "writes": pa.schema([("again", pa.string())])})
    after.process = lambda self, batch: {"again": [""] * batch.num_rows}  # type: ignore[attr-defined]
    stages = (*small_stages(CONFIG), after(CONFIG))
    assert built.reasons(stages) == {"after": {"new stage": 3}}
    built.run(stages)
    stricter = (*small_stages(CONFIG, choose=replace(CONFIG, least=11)), after(CONFIG))
    work = built.work(stricter)
    assert work["after"].reasons == {"after choose": 3} and work["after"].fresh == 0 < work["after"].rows


def test_another_version_is_a_setting(built: Build) -> None:
    newer = type("Newer", (Describe,), {"version": 2})
    stages = [newer(CONFIG) if s.name == "describe" else s for s in small_stages(CONFIG)]
    assert built.reasons(stages)["describe"] == {"changed setting: version 1 → 2": 3}


def test_a_file_that_is_gone(built: Build) -> None:
    """A table, or the tar beside it."""
    stages = small_stages(CONFIG)
    table = make_plan(built.dataset, stages, ingest(built.dataset, built.source)).tickets[1].tables["fetch"]
    built.dataset.remove(table.tar)
    found = built.reasons(stages)
    assert found["fetch"] == {"missing file": 1} and found["first"] == {
        "after fetch": 1,
        "after an earlier partition": 1,
    }


def test_a_build_that_was_stopped(built: Build) -> None:
    stages = small_stages(CONFIG, describe=replace(CONFIG, suffix="?"))
    write_settings(built.dataset, stages)
    for name in built.dataset.list(small_stages(CONFIG)[3].folder):
        if name.startswith("000002"):
            built.dataset.remove(f"{small_stages(CONFIG)[3].folder}/{name}")
    assert built.reasons(small_stages(CONFIG)) == {"choose": {"not made yet": 1}}


def test_a_takedown(built: Build) -> None:
    take_down(built.dataset, Tombstones(keys=frozenset({sample_key(urls(12)[0])})))
    found = built.reasons(small_stages(CONFIG))
    assert found["fetch"] == {"takedown": 1}
    assert all(work.fresh == 0 for work in built.work(small_stages(CONFIG)).values())


def test_damaged_notes_only_cost_their_words(built: Build) -> None:
    stages = small_stages(CONFIG, describe=replace(CONFIG, suffix="!"))
    for text in (b"", b'{"stage": "describe"}', b"[1]"):
        built.dataset.write(f"{small_stages(CONFIG)[2].folder}/settings.json", text)
        assert built.reasons(stages)["describe"] == {"changed setting": 3}
