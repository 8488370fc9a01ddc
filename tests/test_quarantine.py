"""Rows that kill their workers: found by halving, set aside with a reason, and the build goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.compute import Computation
from pipeline.funnel import count_funnel
from pipeline.plan import make_plan
from pipeline.quarantine import DEADLINE_EXCEEDED, WORKER_DIED, Ledger
from pipeline.runner import run_plan
from pipeline.stage import Needs
from pipeline.storage import Folder
from pipeline.tables import read_table
from stages.ingest import ingest
from tests.small_stages import SmallConfig, small_source, small_stages, urls


@pytest.mark.timeout(240)
def test_rows_that_kill_or_hang_are_set_aside_and_the_build_goes_on(tmp_path: Path) -> None:
    """Real Ray actors that are really killed. The others' values are those of a build without such rows."""
    good = [u for u in urls(20) if "bad" not in u]
    killer, hanger = good[4], good[9]
    config = SmallConfig(calls=str(tmp_path / "calls"), batch_size=2)
    deadly = replace(config, kill_at=(killer,), hang_at=(hanger,), needs=Needs(cpus=0.25, deadline=3.0))
    dataset, whole = Folder(url=str(tmp_path / "data")), Folder(url=str(tmp_path / "whole"))
    source = small_source(tmp_path, urls(20), partition_size=10)
    stages = small_stages(config, describe=deadly)
    for folder, runner, listed in ((dataset, "ray", stages), (whole, "local", small_stages(config))):
        partitions = ingest(folder, source)
        run_plan(folder, listed, make_plan(folder, listed, partitions), lambda _: None, runner=runner)
    plans = [make_plan(d, stages, ingest(d, source)) for d in (dataset, whole)]
    assert plans[0].is_empty and plans[1].is_empty
    funnel = count_funnel(dataset, stages, plans[0].tickets)
    assert sum(funnel["describe"].dropped.values()) == 2 and set(funnel["describe"].dropped) <= {
        WORKER_DIED,
        DEADLINE_EXCEEDED,
    }
    assert DEADLINE_EXCEEDED in funnel["describe"].dropped
    assert funnel["choose"].given == funnel["describe"].kept == funnel["describe"].given - 2
    captions = [
        {
            row["key"]: row["caption"]
            for ticket in plan.tickets
            for row in read_table(folder, ticket.tables["describe"]).to_pylist()
        }
        for folder, plan in zip((dataset, whole), plans)
    ]
    differ = {key for key, caption in captions[1].items() if captions[0][key] != caption}
    assert len(differ) == 2 and all(captions[0][key] is None for key in differ)


@given(st.integers(1, 40), st.sets(st.integers(0, 39)), st.integers(1, 9))
def test_halving_finds_exactly_the_deadly_rows(count: int, deadly: set[int], size: int) -> None:
    """Whatever the batch size and however many there are; and each death is paid with a few rows."""
    keys = [f"k{n}" for n in range(count)]
    wanted = {f"k{n}" for n in deadly if n < count}
    ledger, deaths = Ledger(), 0
    while (found := _work(ledger, keys, wanted, size)) is None:
        deaths += 1
    assert found == wanted
    assert deaths <= len(wanted) * (size.bit_length() + 3)


def _work(ledger: Ledger, keys: list[str], deadly: set[str], size: int) -> set[str] | None:
    """One life of a worker: the rows it set aside, or None where it died."""
    aside: set[str] = set()
    decided: set[str] = set()

    def run(rows: list[str]) -> bool:
        how = ledger.begin("place", rows, 3600.0)
        if how == "go":
            if deadly.intersection(rows):
                return False
            ledger.end("place", rows)
        elif how == "halve":
            half = len(rows) // 2
            if not (run(rows[:half]) and run(rows[half:])):
                return False
        else:
            aside.update(rows)
        decided.update(rows)
        return True

    for suspects in ledger.suspects("place"):
        rest = [k for k in suspects if k not in decided]
        if rest and not run(rest):
            return None
    for start in range(0, len(keys), size):
        rest = [k for k in keys[start : start + size] if k not in decided]
        if rest and not run(rest):
            return None
    return aside


def test_a_single_death_is_no_verdict() -> None:
    """The machine may have been at fault: a row alone is tried again once."""
    ledger = Ledger()
    assert [ledger.begin("p", ["a"], 9.0) for _ in range(3)] == ["go", "go", WORKER_DIED]
    assert ledger.begin("p", ["a"], 9.0) == WORKER_DIED and ledger.begin("q", ["a"], 9.0) == "go"


def test_a_deadline_is_told_from_a_death() -> None:
    ledger = Ledger()
    assert [ledger.begin("p", ["a"], 0.0) for _ in range(3)][-1] == DEADLINE_EXCEEDED


def test_the_model_follows_the_engine() -> None:
    """`_work` above does what `Computation` does; should that change its shape, this says so."""
    assert {"isolate_suspects", "run", "_watched"} <= set(dir(Computation))
