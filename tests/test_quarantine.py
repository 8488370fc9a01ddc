"""Rows that kill their workers: found by halving, set aside with a reason, and the build goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.engine import StageWorker
from pipeline.funnel import count_funnel
from pipeline.plan import make_plan
from pipeline.quarantine import DEADLINE_EXCEEDED, WORKER_DIED, Ledger
from pipeline.runner import run_plan
from pipeline.sample import sample_key
from pipeline.stage import Needs, Stage
from pipeline.storage import Folder
from pipeline.tables import read_table
from stages.ingest import ingest
from tests.small_stages import Describe, Small, SmallConfig, small_source, small_stages, urls


@pytest.mark.timeout(240)
def test_rows_that_kill_or_hang_are_set_aside_and_the_build_goes_on(tmp_path: Path) -> None:
    """Real Ray actors that are really killed. The others' values are those of a build without such rows. The stages before
    the deadly one are done beforehand, without Ray: their actors would only take time to start.
    """
    good = [u for u in urls(20) if "bad" not in u]
    killer, hanger = good[4], good[9]
    config = SmallConfig(calls=str(tmp_path / "calls"), batch_size=2)
    deadly = replace(config, kill_at=(killer,), hang_at=(hanger,), needs=Needs(cpus=0.25, deadline=3.0))
    dataset, whole = Folder(url=str(tmp_path / "data")), Folder(url=str(tmp_path / "whole"))
    source = small_source(tmp_path, urls(20), partition_size=10)
    stages = small_stages(config, describe=deadly)
    for folder, runner, listed in ((dataset, "ray", stages), (whole, "local", small_stages(config))):
        partitions = ingest(folder, source)
        run_plan(folder, stages[:2], make_plan(folder, stages[:2], partitions), lambda _: None, runner="local")
        run_plan(folder, listed, make_plan(folder, listed, partitions), lambda _: None, runner=runner)
    plans = [make_plan(d, stages, ingest(d, source)) for d in (dataset, whole)]
    assert plans[0].is_empty and plans[1].is_empty
    funnel = count_funnel(dataset, stages, plans[0].tickets)
    assert sum(funnel["describe"].failed.values()) == 2 and set(funnel["describe"].failed) <= {
        WORKER_DIED,
        DEADLINE_EXCEEDED,
    }
    assert DEADLINE_EXCEEDED in funnel["describe"].failed
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


class Died(BaseException):
    """Stands for a worker's death: nothing of it comes back but what the watch was told."""


class Deadly(Small):
    """Reads the url; dies of some. What it says depends on the order of rows where it is ordered."""

    name = "deadly"
    reads = ("url",)
    writes = pa.schema([("seen", pa.int32())])
    drops = False
    deadly: frozenset[str] = frozenset()
    error: type[BaseException] = Died

    def load(self) -> None:
        self.count = 0

    def process(self, batch):
        found = batch.column("url").to_pylist()
        if self.deadly.intersection(found):
            raise self.error
        self.count += len(found)
        return {"seen": [self.count if self.ordered else len(url) for url in found]}


def live(dataset: Folder, stage: Deadly, source) -> tuple[int, set[str]]:
    """Works until the build is done, with a new worker after each death: how many there were, and the urls set aside."""
    partitions, ledger, deaths = ingest(dataset, source), Ledger(), 0
    while not (plan := make_plan(dataset, [stage], partitions)).is_empty:
        worker = StageWorker(dataset, [stage], 0, partitions, watch=ledger)
        try:
            for ticket in plan.tickets:
                worker.work(ticket, lambda _: None)
        except Died:
            deaths += 1
            assert deaths < 200
    aside = set()
    for ticket in plan.tickets:
        rows = read_table(dataset, ticket.tables["deadly"]).filter(pc.field("reason") == WORKER_DIED)
        aside |= set(rows.column("key").to_pylist())
    return deaths, aside


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 24), st.sets(st.integers(0, 23)), st.integers(1, 9), st.booleans())
def test_halving_finds_exactly_the_deadly_rows(
    tmp_path_factory: pytest.TempPathFactory, count: int, deadly: set[int], size: int, ordered: bool
) -> None:
    """Whatever the batch size and however many there are, also where the rows' order counts; each death is paid once."""
    folder = tmp_path_factory.mktemp("deadly")
    found = [f"u://{n}" for n in range(count)]
    stage = type("Stage", (Deadly,), {"deadly": frozenset(f"u://{n}" for n in deadly), "ordered": ordered})(
        SmallConfig(batch_size=size)
    )
    source = small_source(folder, found, partition_size=10)
    deaths, aside = live(Folder(url=str(folder / "data")), stage, source)
    wanted = {sample_key(url) for url in stage.deadly.intersection(found)}
    assert aside == wanted and deaths <= len(wanted) * (size.bit_length() + 3)


def test_a_stage_whose_loading_kills_its_workers_is_an_error(tmp_path: Path) -> None:
    def die(self: Deadly) -> None:
        raise Died

    stage = type("Stage", (Deadly,), {"load": die})(SmallConfig())
    with pytest.raises(RuntimeError, match="its workers die while they load it"):
        live(Folder(url=str(tmp_path / "data")), stage, small_source(tmp_path, urls(3)))


def test_what_runs_out_of_memory_is_halved_too(tmp_path: Path) -> None:
    """An exception, and no death: the worker goes on by itself. Any other exception is an error of the stage."""
    dataset, source = Folder(url=str(tmp_path / "data")), small_source(tmp_path, urls(9), partition_size=9)
    hungry = {"deadly": frozenset({urls(9)[4]}), "error": MemoryError}
    assert live(dataset, type("Stage", (Deadly,), hungry)(SmallConfig(batch_size=4)), source) == (
        0,
        {sample_key(urls(9)[4])},
    )
    with pytest.raises(ZeroDivisionError):
        wrong = type("Stage", (Deadly,), {**hungry, "error": ZeroDivisionError})(SmallConfig(suffix="x"))
        live(dataset, wrong, source)


def test_a_row_that_was_set_aside_goes_no_further(tmp_path: Path) -> None:
    """Also where another row was dropped meanwhile, so that there are as many rows as values. A retry brings it back."""
    config, source = SmallConfig(), small_source(tmp_path, ["u://a", "u://b", "u://c"])
    gate = type(
        "Gate",
        (Deadly,),
        {"name": "gate", "drops": True, "writes": pa.schema([("gate", pa.int32())]), "process": drop_last},
    )
    after = type("After", (Describe,), {"reads": ("seen",), "process": lambda self, batch: {
        "caption": [str(1 // n) for n in batch.column("seen").to_pylist()]}})  # fmt: skip
    hungry = type("Hungry", (Deadly,), {"deadly": frozenset({"u://a"}), "error": MemoryError})(config)
    dataset, stages = Folder(url=str(tmp_path / "data")), (hungry, gate(config), after(config))
    for retry in (False, True):
        plan = make_plan(dataset, stages, ingest(dataset, source), retry=retry)
        run_plan(dataset, stages, plan, lambda _: None, runner="local")
        plan = make_plan(dataset, stages, ingest(dataset, source))
        funnel = count_funnel(dataset, stages, plan.tickets)
        assert plan.is_empty and [funnel[s.name].given for s in stages] == [3, 3, 2 if retry else 1]
        hungry.deadly = frozenset()


def drop_last(self: Stage, batch: pa.Table):
    rest = batch.num_rows - 1
    ends = {"status": ["kept"] * rest + ["dropped"], "reason": [None] * rest + ["last"]}
    return {"gate": [0] * batch.num_rows, **ends}


def test_a_single_death_is_no_verdict() -> None:
    """The machine may have been at fault: a row alone is tried again once."""
    ledger = Ledger()
    assert [ledger.begin("p", ["a"], 9.0) for _ in range(3)] == ["go", "go", WORKER_DIED]
    assert ledger.begin("p", ["a"], 9.0) == WORKER_DIED and ledger.begin("q", ["a"], 9.0) == "go"


def test_a_deadline_is_told_from_a_death() -> None:
    ledger = Ledger()
    assert [ledger.begin("p", ["a"], 0.0) for _ in range(3)][-1] == DEADLINE_EXCEEDED
