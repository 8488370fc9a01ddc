"""The engine's promises, with small stages: nothing twice, nothing lost, the same bytes however it is run."""

from __future__ import annotations

import hashlib
import multiprocessing
import uuid
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline import engine, ray_stream, reuse, workers
from pipeline.funnel import count_funnel
from pipeline.plan import Plan, make_plan
from pipeline.runner import StageError, run_plan
from pipeline.stage import Stage, check_stages
from pipeline.storage import Folder
from stages.ingest import ingest
from stages.source import Source
from tests.small_stages import Choose, Describe, SmallConfig, small_source, small_stages, urls


def run(dataset: Folder, stages, source: Source, runner: str = "local", **options) -> Plan:
    partitions = ingest(dataset, source)
    run_plan(dataset, stages, make_plan(dataset, stages, partitions), lambda _: None, runner=runner, **options)
    return make_plan(dataset, stages, partitions)


def calls(config: SmallConfig) -> Counter[str]:
    path = Path(config.calls)
    counted = Counter(line.split()[0] for line in path.read_text().splitlines()) if path.exists() else Counter()
    path.unlink(missing_ok=True)
    return counted


def digests(folder: Path) -> dict[str, str]:
    """Of every file but those that say when something was tried."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith(".")]
    files = [p for p in files if p.parent.name != "records"]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture
def config(tmp_path: Path) -> SmallConfig:
    return SmallConfig(calls=str(tmp_path / "calls"))


def test_funnel_sums_at_every_stage(tmp_path: Path, config: SmallConfig) -> None:
    dataset, stages = Folder(url=str(tmp_path / "data")), small_stages(config, choose=replace(config, least=11))
    plan = run(dataset, stages, small_source(tmp_path, urls(60)))
    funnel = count_funnel(dataset, stages, plan.tickets)
    given = 60
    for name, row in funnel.items():
        assert row.given == row.kept + sum(row.dropped.values()) + sum(row.failed.values()), name
        assert row.given == given
        given = row.kept if name != "describe" else row.given
    assert funnel["fetch"].failed == {"bad_url": 9} and funnel["first"].dropped and funnel["choose"].dropped


def test_nothing_changed_computes_nothing(tmp_path: Path, config: SmallConfig) -> None:
    dataset, stages = Folder(url=str(tmp_path / "data")), small_stages(config)
    source = small_source(tmp_path, urls(23))
    run(dataset, stages, source)
    before = digests(tmp_path / "data")
    calls(config)
    assert run(dataset, stages, source).is_empty
    assert not calls(config) and digests(tmp_path / "data") == before


def test_another_batch_size_changes_nothing(tmp_path: Path, config: SmallConfig) -> None:
    dataset, source = Folder(url=str(tmp_path / "data")), small_source(tmp_path, urls(23))
    run(dataset, small_stages(config), source)
    assert make_plan(dataset, small_stages(replace(config, batch_size=7)), ingest(dataset, source)).is_empty


def test_changed_threshold_redoes_only_the_choice_and_back_costs_nothing(tmp_path: Path, config: SmallConfig) -> None:
    dataset, source = Folder(url=str(tmp_path / "data")), small_source(tmp_path, urls(23))
    run(dataset, small_stages(config), source)
    calls(config)
    run(dataset, small_stages(config, choose=replace(config, least=11)), source)
    assert set(calls(config)) == {"choose"}
    run(dataset, small_stages(config), source)
    assert not calls(config)


def test_new_rows_compute_only_themselves(tmp_path: Path, config: SmallConfig) -> None:
    dataset, stages = Folder(url=str(tmp_path / "data")), small_stages(config)
    run(dataset, stages, small_source(tmp_path, urls(23)))
    calls(config)
    shuffled = [*urls(30)[23:], *reversed(urls(23)), urls(23)[0]]
    run(dataset, stages, small_source(tmp_path, shuffled))
    assert calls(config)["fetch"] == 7


def test_equal_output_stops_the_wave_and_equal_rows_are_reused(tmp_path: Path, config: SmallConfig) -> None:
    """Another fetch setting rewrites the images' table; the choice before the captions comes out equal, captions are redone."""
    dataset, source = Folder(url=str(tmp_path / "data")), small_source(tmp_path, urls(23))
    run(dataset, small_stages(config), source)
    calls(config)
    run(dataset, small_stages(config, describe=replace(config, suffix="!")), source)
    redone = calls(config)
    assert set(redone) == {"describe", "choose"}
    # least=1 keeps the same rows under another config id: the table's content is the same, so nothing follows from it.
    run(dataset, small_stages(config, fetch=replace(config, least=1)), source)
    assert set(calls(config)) == {"fetch"}


def test_rows_made_from_the_same_values_are_copied_in_order(tmp_path: Path, config: SmallConfig) -> None:
    """A partition redone because one of its rows changed takes over the others, byte for byte as if all were computed."""
    source = small_source(tmp_path, urls(5))

    class Choosy(Choose):
        """Writes the same as Choose, but only for even keys the first time."""

        version = 2

    one, two = Folder(url=str(tmp_path / "one")), Folder(url=str(tmp_path / "two"))
    run(one, small_stages(config), source)
    calls(config)
    changed = small_stages(config, first=replace(config, least=1))
    fetch_changed = small_stages(config, fetch=replace(config, suffix=""), describe=config)
    assert [s.config_id for s in fetch_changed] == [s.config_id for s in small_stages(config)]
    run(one, changed, source)
    run(two, changed, source)
    for name in ("describe", "choose"):
        ours, theirs = (digests(next(Path(d.url).glob(f"{name}-*"))) for d in (one, two))
        assert set(theirs) <= set(ours)


@pytest.mark.timeout(240)
def test_ray_writes_the_same_bytes_as_local(tmp_path: Path, config: SmallConfig) -> None:
    source = small_source(tmp_path, urls(37))
    stages = small_stages(config)
    run(Folder(url=str(tmp_path / "local")), stages, source, "local")
    ours = calls(config)
    run(Folder(url=str(tmp_path / "ray")), stages, source, "ray")
    assert digests(tmp_path / "ray") == digests(tmp_path / "local")
    assert calls(config) == ours


def test_a_killed_build_goes_on_and_ends_the_same(tmp_path: Path, config: SmallConfig) -> None:
    source = small_source(tmp_path, urls(37))
    dying = replace(config, die_at=urls(37)[21])
    stages = small_stages(config, fetch=dying)
    marker = Path(config.calls + ".die")
    marker.touch()
    dataset = Folder(url=str(tmp_path / "killed"))
    process = multiprocessing.get_context("fork").Process(target=run, args=(dataset, stages, source))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    done = calls(config)["fetch"]
    marker.unlink()
    run(dataset, stages, source)
    assert done > 0 and calls(config)["fetch"] < 37
    run(Folder(url=str(tmp_path / "whole")), stages, source)
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")


def test_a_failing_stage_says_which_and_where(tmp_path: Path, config: SmallConfig) -> None:
    class Broken(Describe):
        def process(self, batch):
            raise RuntimeError("no model")

    stages = [*small_stages(config)[:2], Broken(config)]
    with pytest.raises(StageError, match=r"stage 'describe', partition 000000-[0-9a-f]{8}: RuntimeError: no model"):
        run(Folder(url=str(tmp_path / "data")), stages, small_source(tmp_path, urls(5)))


def test_a_stage_that_returns_too_little_is_refused(tmp_path: Path, config: SmallConfig) -> None:
    class Short(Describe):
        def process(self, batch):
            return {"caption": ["one"]}

    with pytest.raises(StageError, match="must return"):
        run(
            Folder(url=str(tmp_path / "data")),
            [*small_stages(config)[:2], Short(config)],
            small_source(tmp_path, urls(5)),
        )


def test_impossible_stage_lists_are_refused(config: SmallConfig) -> None:
    with pytest.raises(ValueError, match="reads 'caption', which no stage before it writes"):
        check_stages([Choose(config)])
    with pytest.raises(ValueError, match="two stages are called 'describe'"):
        check_stages([*small_stages(config), Describe(config)])


def test_ordered_stage_goes_on_in_a_new_process(tmp_path: Path, config: SmallConfig) -> None:
    """First come wins also when the first came in an earlier run."""
    dataset, stages = Folder(url=str(tmp_path / "data")), small_stages(config)
    run(dataset, stages, small_source(tmp_path, urls(40)))
    plan = run(dataset, stages, small_source(tmp_path, urls(80)))
    whole = run(Folder(url=str(tmp_path / "whole")), stages, small_source(tmp_path, urls(80)))
    ours, theirs = (
        count_funnel(Folder(url=str(tmp_path / d)), stages, p.tickets) for d, p in (("data", plan), ("whole", whole))
    )
    assert ours == theirs


class Shrink(Describe):
    """caption → its bytes, in a tar."""

    name = "shrink"
    reads = ("caption",)
    writes = pa.schema([("letters", pa.int32())])
    payload = {"small": "txt"}

    def process(self, batch):
        self.note(batch)
        captions = batch.column("caption").to_pylist()
        return {"letters": [len(c) for c in captions], "small": [c.encode() for c in captions]}


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_reused_bytes_are_copied_in_small_pieces(
    tmp_path: Path, config: SmallConfig, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    """A partition's pictures together are gigabytes. Fresh rows lie among the reused, and the bytes are as if all were fresh."""
    config = replace(config, batch_size=batch_size)
    mixed = [url for pair in zip(urls(40)[:20], urls(40)[20:]) for url in pair]
    source = small_source(tmp_path, mixed, partition_size=40)
    loose, strict = ([*small_stages(config, choose=replace(config, least=least)), Shrink(config)] for least in (0, 11))
    one, two = Folder(url=str(tmp_path / "one")), Folder(url=str(tmp_path / "two"))
    run(one, strict, source)
    calls(config)
    read, sizes = reuse.read_payloads, []
    monkeypatch.setattr(
        reuse, "read_payloads", lambda d, t, rows, c: (sizes.append(rows.num_rows), read(d, t, rows, c))[1]
    )
    run(one, loose, source)
    assert 0 < calls(config)["shrink"] < 20 < sum(sizes) and max(sizes) <= batch_size
    run(two, loose, source)
    ours, theirs = (digests(tmp_path / d / loose[-1].folder) for d in ("one", "two"))
    assert set(theirs.items()) <= set(ours.items())


def test_an_ordered_stage_lists_as_often_as_there_are_stages_not_partitions(
    tmp_path: Path, config: SmallConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, stages, source = Folder(url=str(tmp_path / "data")), small_stages(config), small_source(tmp_path, urls(60))
    run(dataset, stages, source)
    before = digests(tmp_path / "data")
    for table in dataset.list(stages[2].folder)[::2]:  # as a killed build leaves gaps
        dataset.remove(f"{stages[2].folder}/{table}")
    dataset.remove(f"{stages[1].folder}/{dataset.list(stages[1].folder)[-2]}")
    plans, plan = [], engine.make_plan
    monkeypatch.setattr(engine, "make_plan", lambda *given: (plans.append(given), plan(*given))[1])
    run(dataset, stages, source)
    assert digests(tmp_path / "data") == before and len(plans) <= 2


def test_a_row_must_end_in_one_of_three_ways(tmp_path: Path, config: SmallConfig) -> None:
    class Vague(Describe):
        def process(self, batch):
            return {**super().process(batch), "status": ["ok"] * batch.num_rows, "reason": [None] * batch.num_rows}

    with pytest.raises(StageError, match=r"a row is kept, or dropped or failed with a reason, not ok \(None\)"):
        run(
            Folder(url=str(tmp_path / "d")), [*small_stages(config)[:2], Vague(config)], small_source(tmp_path, urls(5))
        )


def test_a_stage_keeps_its_folder_while_its_model_changes(tmp_path: Path, config: SmallConfig) -> None:
    """Else what the old weights said would be published as the new ones' word. Workers take the driver's over."""
    weights = tmp_path / "weights"

    class Model(Describe):
        def identity(self) -> str:
            return weights.read_text()

    weights.write_text("old")
    stage = Model(config)
    before = stage.folder
    weights.write_text("new")
    assert stage.folder == before != Model(config).folder
    assert "config_id" in stage.__getstate__()


def test_the_bytes_of_two_stages_cannot_be_read_at_once(config: SmallConfig) -> None:
    class Both(Describe):
        name = "both"
        reads = ("image", "small")

    with pytest.raises(ValueError, match="stage 'both' reads the bytes image and small: one of them is the most"):
        check_stages([*small_stages(config), Shrink(config), Both(config)])


def test_a_dataset_elsewhere_says_the_same(tmp_path: Path, config: SmallConfig) -> None:
    """On another file system than the disk, also when it grows and when rows are reused."""
    here, there = Folder(url=str(tmp_path / "data")), Folder(url=f"memory://{uuid.uuid4().hex}/data")
    for count, least in ((23, 0), (40, 11), (40, 0)):
        stages: list[Stage] = [*small_stages(config, choose=replace(config, least=least)), Shrink(config)]
        plans = [run(d, stages, small_source(tmp_path, urls(count))) for d in (here, there)]
        assert plans[0] == plans[1] and plans[1].is_empty
        assert count_funnel(here, stages, plans[0].tickets) == count_funnel(there, stages, plans[1].tickets)
        for stage in stages:
            assert here.list(stage.folder) == there.list(stage.folder)
            for name in here.list(stage.folder):
                assert here.read(f"{stage.folder}/{name}") == there.read(f"{stage.folder}/{name}")


def test_workers_are_told_the_whole_path(monkeypatch: pytest.MonkeyPatch, config: SmallConfig, tmp_path: Path) -> None:
    """Those of a cluster that runs already have another working folder."""
    import ray

    class Stream:
        def map_batches(self, kind, *, fn_constructor_args, **_):
            self.dataset = fn_constructor_args[0].dataset
            return self

    monkeypatch.setattr(ray.data, "from_items", lambda rows, **_: Stream())
    monkeypatch.chdir(tmp_path)
    job = workers.Job(dataset=Folder(url="build/data"), stages=small_stages(config), partitions=(), retry=False)
    stream = ray_stream._stream(job, [0], [], None)
    assert stream.dataset == Folder(url=str(tmp_path / "build" / "data"))


def test_a_stricter_choice_computes_nothing_after_it(tmp_path: Path, config: SmallConfig) -> None:
    """All rows of the stage after it are reused, and there is none left to compute."""
    dataset, source = Folder(url=str(tmp_path / "data")), small_source(tmp_path, urls(40), partition_size=40)
    for least, computed in ((0, {"fetch", "first", "describe", "choose", "shrink"}), (11, {"choose"})):
        run(dataset, [*small_stages(config, choose=replace(config, least=least)), Shrink(config)], source)
        assert set(calls(config)) == computed
