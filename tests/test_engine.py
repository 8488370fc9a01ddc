"""The engine's promises, with small stages: nothing twice, nothing lost, the same bytes however it is run."""

from __future__ import annotations

import hashlib
import multiprocessing
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.funnel import count_funnel
from pipeline.plan import Plan, make_plan
from pipeline.runner import StageError, run_plan
from pipeline.stage import check_stages
from pipeline.storage import Folder
from stages.ingest import Source, ingest
from tests.small_stages import Choose, Describe, SmallConfig, small_source, small_stages, urls


def run(dataset: Folder, stages, source: Source, runner: str = "local") -> Plan:
    partitions = ingest(dataset, source)
    run_plan(dataset, stages, make_plan(dataset, stages, partitions), lambda _: None, runner=runner)
    return make_plan(dataset, stages, partitions)


def calls(config: SmallConfig) -> Counter[str]:
    path = Path(config.calls)
    counted = Counter(line.split()[0] for line in path.read_text().splitlines()) if path.exists() else Counter()
    path.unlink(missing_ok=True)
    return counted


def digests(folder: Path) -> dict[str, str]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith(".")]
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
    with pytest.raises(StageError, match=r"stage 'describe', partition 000000: RuntimeError: no model"):
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
