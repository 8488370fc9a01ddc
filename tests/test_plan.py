"""The plan: the stages held against a listing. What depends on what, and that names alone tell it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.partitions import Partition, list_partitions
from pipeline.plan import Ticket, depends_on, input_id, make_plan
from pipeline.stage import Stage
from pipeline.storage import Folder
from pipeline.tables import TableName
from tests.small_stages import Small, SmallConfig, small_stages

STAGES = small_stages(SmallConfig())  # fetch (drops), first (drops, ordered), describe (keeps all), choose (drops)
FETCH, FIRST, DESCRIBE, CHOOSE = range(4)


class Measure(Small):
    """Reads what fetch wrote, drops nothing."""

    name = "measure"
    reads = ("size",)
    writes = pa.schema([("twice", pa.int32())])
    drops = False


def partition(number: int = 0, content: str = "c") -> Partition:
    return Partition(name=f"{number:06d}-aa", rows=5, content_id=content)


def lay_down(
    dataset: Folder, partitions: list[Partition], stages: tuple[Stage, ...] = STAGES, content: str = "x"
) -> None:
    """Empty files with the names that a build would give them."""
    for p in partitions:
        dataset.write(p.parquet, b"")
    for index, stage in enumerate(stages):
        before = ""
        for ticket in make_plan(dataset, stages, partitions).tickets:
            wanted = input_id(stage, depends_on(stages, index), ticket, before)
            assert wanted is not None
            before = wanted if stage.ordered else ""
            lay_table(dataset, stage, ticket.partition, wanted, content + stage.name)


def table(stage: Stage, part: Partition, wanted: str, content: str, transient: int = 0) -> TableName:
    return TableName(
        folder=stage.folder,
        partition=part.name,
        input_id=wanted,
        content_id=content,
        rows=part.rows,
        kept=part.rows - transient,
        transient=transient,
    )


def lay_table(
    dataset: Folder, stage: Stage, part: Partition, wanted: str, content: str, transient: int = 0
) -> TableName:
    name = table(stage, part, wanted, content, transient)
    dataset.write(name.parquet, b"")
    if stage.payload:
        dataset.write(name.tar, b"")
    return name


def given_id(index: int, ticket: Ticket, before: str = "") -> str | None:
    return input_id(STAGES[index], depends_on(STAGES, index), ticket, before)


def names(stages: list[Stage]) -> list[str]:
    return [s.name for s in stages]


def test_a_stage_depends_on_what_it_reads_and_on_all_that_drops() -> None:
    stages = (*STAGES, Measure(SmallConfig()))
    assert [names(depends_on(stages, i)) for i in range(5)] == [
        [],
        ["fetch"],
        ["fetch", "first"],
        ["fetch", "first", "describe"],
        ["fetch", "first", "choose"],  # not describe: it drops nothing and measure does not read it
    ]


def test_the_last_writer_of_a_column_counts() -> None:
    class Rewrite(Measure):
        name = "rewrite"
        reads = ("caption",)
        writes = pa.schema([("caption", pa.string())])

    stages = (*STAGES[:CHOOSE], Rewrite(SmallConfig()), STAGES[CHOOSE])
    assert names(depends_on(stages, 4)) == ["fetch", "first", "rewrite"]


@given(st.lists(st.text("abcdef", min_size=1, max_size=3), min_size=4, max_size=4), st.integers(0, 3), st.booleans())
def test_input_ids_change_with_every_content_they_depend_on(contents: list[str], changed: int, ordered: bool) -> None:
    ticket = Ticket(partition=partition())
    for stage, content in zip(STAGES, contents):
        ticket = ticket.with_table(stage, table(stage, ticket.partition, "i", content))
    stage = STAGES[changed]
    other = ticket.with_table(stage, replace(ticket.tables[stage.name], content_id="new"))
    for index in range(4):
        depends = stage.name in names(depends_on(STAGES, index))
        assert (given_id(index, ticket) != given_id(index, other)) == depends
        before = given_id(index, ticket, "another" if ordered else "")
        assert (before != given_id(index, ticket)) == (ordered and STAGES[index].ordered)
    moved = replace(ticket, partition=partition(content="d"))
    assert given_id(FETCH, moved) != given_id(FETCH, ticket)


def test_without_its_inputs_a_stage_has_no_input_id() -> None:
    assert [given_id(i, Ticket(partition=partition())) is None for i in range(4)] == [
        False,
        True,
        True,
        True,
    ]


def test_a_plan_opens_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of no bytes at all are planned with: the names say everything."""
    dataset, partitions = Folder(url=str(tmp_path)), [partition(n) for n in range(3)]
    assert [s.to_compute for s in make_plan(dataset, STAGES, partitions).stages] == [3, 3, 3, 3]
    lay_down(dataset, partitions)
    monkeypatch.setattr(Folder, "read", lambda *_: pytest.fail("opened a file"))
    plan = make_plan(dataset, STAGES, list_partitions(dataset))
    assert plan.is_empty and [s.up_to_date for s in plan.stages] == [3, 3, 3, 3]
    assert all(set(t.tables) == {s.name for s in STAGES} for t in plan.tickets)


def test_what_is_missing_makes_the_rest_unknown_from_there(tmp_path: Path) -> None:
    """First is ordered: what is unknown of one partition is unknown of those after it, but its own table may be missing."""
    dataset, partitions = Folder(url=str(tmp_path)), [partition(n) for n in range(3)]
    lay_down(dataset, partitions)
    for gone, expected in ((DESCRIBE, [0, 0, 1, 1]), (FIRST, [0, 1, 1, 1]), (FETCH, [1, 2, 2, 2])):
        removed = make_plan(dataset, STAGES, partitions).tickets[1].tables[STAGES[gone].name]
        dataset.remove(removed.parquet)
        plan = make_plan(dataset, STAGES, partitions)
        assert [s.to_compute for s in plan.stages] == expected
        assert [s.rows for s in plan.stages] == [5 * n for n in expected]
        dataset.write(removed.parquet, b"")
    assert make_plan(dataset, STAGES, partitions).is_empty


def test_of_two_tables_of_one_input_all_readers_pick_the_same(tmp_path: Path) -> None:
    """Two builders at once may both publish: later stages follow one of them, whatever the order of arrival."""
    for order in itertools.permutations("ab"):
        dataset = Folder(url=str(tmp_path / "".join(order)))
        lay_down(dataset, [partition()])
        wanted = make_plan(dataset, STAGES, [partition()]).tickets[0].tables["fetch"].input_id
        for content in order:
            lay_table(dataset, STAGES[FETCH], partition(), wanted, content)
        plan = make_plan(dataset, STAGES, [partition()])
        assert plan.tickets[0].tables["fetch"].content_id == "a" and plan.stages[FIRST].to_compute == 1


def test_other_files_do_not_confuse_it(tmp_path: Path) -> None:
    dataset = Folder(url=str(tmp_path))
    lay_down(dataset, [partition()])
    for name in (
        "partitions/readme.txt",
        "partitions/000001.parquet",
        "partitions/.aside-1",
        f"{STAGES[0].folder}/x.tar",
    ):
        dataset.write(name, b"")
    assert list_partitions(dataset) == [partition()] and make_plan(dataset, STAGES, list_partitions(dataset)).is_empty


def test_a_tar_without_its_table_is_not_there_nor_the_other_way_round(tmp_path: Path) -> None:
    dataset = Folder(url=str(tmp_path))
    lay_down(dataset, [partition()])
    there = make_plan(dataset, STAGES, [partition()]).tickets[0].tables["fetch"]
    for gone, kept in ((there.parquet, there.tar), (there.tar, there.parquet)):
        dataset.remove(gone)
        dataset.write(kept, b"")
        assert make_plan(dataset, STAGES, [partition()]).stages[FETCH].to_compute == 1
        dataset.write(gone, b"")


def test_no_partitions_need_nothing(tmp_path: Path) -> None:
    assert make_plan(Folder(url=str(tmp_path)), STAGES, []).is_empty
