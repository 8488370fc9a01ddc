"""What no recipe can reach goes; whatever one can reach, build on, train on or resume from stays."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.cli import run as run_job
from jobs.gc import GcOptions, collect, trained_manifests
from jobs.recipe import Recipe
from pipeline.garbage import KILLED, Garbage
from pipeline.plan import Plan, make_plan
from pipeline.runner import run_plan
from pipeline.settings import SETTINGS, write_settings
from pipeline.shards import View
from pipeline.stage import Stage
from pipeline.tables import list_tables
from stages.ingest import ingest, ingested
from stages.pack import Pack, PackConfig
from stages.publish import publish_view
from tests.small_stages import Fetch, Small, SmallConfig, small_source, small_stages, urls
from tests.test_engine import calls, digests
from tests.training_fixtures import training_config
from training.configuration import ValidationConfig

NOW = GcOptions(min_age_hours=0)
DELETE = GcOptions(min_age_hours=0, delete=True)


@pytest.fixture
def config(tmp_path: Path) -> SmallConfig:
    return SmallConfig(calls=str(tmp_path / "calls"))


def make_recipe(folder: Path, stages: Sequence[Stage], count: int = 12, url: str = "") -> Recipe:
    return Recipe(
        name="small",
        dataset=url or str(folder / "data"),
        source=small_source(folder, urls(count)),
        stages=tuple(stages),
        runs=str(folder / "runs"),
    )


def build(recipe: Recipe, only: int | None = None) -> None:
    """Ingests and builds, `only` so many partitions; publishes views where all was built."""
    dataset = recipe.folder
    partitions = ingest(dataset, recipe.source)
    plan = make_plan(dataset, recipe.stages, partitions[:only])
    write_settings(dataset, recipe.stages)
    run_plan(dataset, recipe.stages, plan, lambda _: None, runner="local")
    tickets = make_plan(dataset, recipe.stages, partitions).tickets
    for stage in recipe.stages:
        if isinstance(stage, Pack) and only is None:
            publish_view(dataset, stage, tickets)


def plan_of(recipe: Recipe) -> Plan:
    return make_plan(recipe.folder, recipe.stages, ingested(recipe.folder, recipe.source))


def state(recipe: Recipe) -> list[Any]:
    """What the recipe's plan says; not which other tables its folders hold."""
    plan = plan_of(recipe)
    return [plan.tickets, [(s.up_to_date, s.missing, s.wanted) for s in plan.stages]]


def whys(garbage: Sequence[Garbage]) -> dict[str, str]:
    return {item.folder.rsplit("-", 1)[0]: item.why for item in garbage}


def test_what_only_the_other_recipe_made_goes(tmp_path: Path, config: SmallConfig) -> None:
    one = make_recipe(tmp_path, small_stages(config, choose=replace(config, least=11)))
    other = replace(one, stages=small_stages(config, describe=replace(config, suffix="!")))
    build(other)
    theirs = digests(tmp_path / "data")
    build(one)
    every = digests(tmp_path / "data")
    garbage = collect([one], NOW)
    assert whys(garbage) == {
        "describe": 'older settings: suffix "!" → ""',
        "choose": "older settings: least 0 → 11",
    }
    assert digests(tmp_path / "data") == every, "without --delete nothing is deleted"
    assert collect([one, other], NOW) == []
    assert collect([one], DELETE) == garbage
    left = digests(tmp_path / "data")
    gone = every.keys() - left.keys()
    assert gone == {path for item in garbage for path in item.files}
    assert gone == {p for p in theirs if p.startswith(tuple(s.folder for s in other.stages[2:]))}
    assert sum(item.size for item in garbage) > 0
    assert not any((tmp_path / "data" / s.folder).exists() for s in other.stages[2:])
    calls(config)
    build(one)
    assert not calls(config) and digests(tmp_path / "data") == left
    build(other)
    assert set(calls(config)) == {"describe", "choose"}
    assert every.items() >= theirs.items() and digests(tmp_path / "data") == every


def test_tables_that_later_ones_superseded_go_and_so_do_their_records(tmp_path: Path, config: SmallConfig) -> None:
    slow = replace(config, fail_at=(urls(12)[0],))
    recipe = make_recipe(tmp_path, small_stages(slow))
    build(recipe)
    mended = replace(recipe, stages=small_stages(config))
    plan = make_plan(recipe.folder, mended.stages, ingested(recipe.folder, recipe.source), retry=True)
    run_plan(recipe.folder, mended.stages, plan, lambda _: None, runner="local")
    garbage = collect([recipe], DELETE)
    assert set(whys(garbage).values()) == {"superseded"}
    fetched = next(item for item in garbage if item.folder.startswith("fetch-"))
    assert [Path(f).suffix for f in sorted(fetched.files, key=lambda f: "records" in f)] == [
        ".parquet",
        ".tar",
        ".parquet",
    ]
    assert plan_of(recipe).is_empty
    folder = tmp_path / "data" / recipe.stages[0].folder
    assert {p.name for p in (folder / "records").iterdir()} == {p.name for p in folder.glob("*.parquet")}


def test_a_half_built_dataset_keeps_the_rows_that_it_can_reuse(tmp_path: Path, config: SmallConfig) -> None:
    """Another choice of rows before a costly stage: half of the partitions are done when gc comes."""

    class Costly(Fetch):
        name = "costly"
        reads = ("caption",)
        writes = pa.schema([("letters", pa.int32())])
        payload = {"small": "txt"}

        def process(self, batch: pa.Table) -> Any:
            self.note(batch)
            captions = batch.column("caption").to_pylist()
            return {"letters": [len(c) for c in captions], "small": [c.encode() for c in captions]}

    one, other = (
        make_recipe(tmp_path, [*small_stages(config, choose=replace(config, least=n)), Costly(config)]) for n in (11, 0)
    )
    build(one)
    build(other, only=1)
    shutil.copytree(tmp_path / "data", tmp_path / "untouched")
    calls(config)
    without = replace(other, dataset=str(tmp_path / "untouched"))
    build(without)
    expected = calls(config)
    assert 0 < expected["costly"] < sum(t.partition.rows for t in plan_of(without).tickets[1:])
    assert one.stages[3].folder in {item.folder for item in collect([other], DELETE)}
    build(other)
    assert calls(config) == expected and plan_of(other).tickets == plan_of(without).tickets


def test_what_a_killed_build_left_goes_once_it_is_old(tmp_path: Path, config: SmallConfig) -> None:
    recipe = make_recipe(tmp_path, small_stages(config))
    build(recipe)
    before = digests(tmp_path / "data")
    data, fetched = tmp_path / "data", recipe.stages[0].folder
    tar = next((data / fetched).glob("*.tar"))
    orphan = tar.with_name(tar.name.replace(tar.name.split(".")[1], "0" * 16))
    leftovers = [data / fetched / ".aside-1", data / "partitions" / ".aside-2", data / fetched / "records" / ".aside-3"]
    for path in (*leftovers, orphan):
        path.write_bytes(b"half")
    assert collect([recipe], replace(DELETE, min_age_hours=1.0)) == [], "a build may be writing them"
    for path in (*leftovers, orphan):
        os.utime(path, (0, 0))
    garbage = collect([recipe], replace(DELETE, min_age_hours=1.0))
    assert {item.why for item in garbage} == {KILLED}
    assert sorted(f for item in garbage for f in item.files) == sorted(
        str(p.relative_to(data)) for p in (*leftovers, orphan)
    )
    assert not any(p.exists() for p in (*leftovers, orphan)) and digests(data) == before


def test_what_is_young_stays_whole(tmp_path: Path, config: SmallConfig) -> None:
    """A table's tar is older than the table by as long as it took to write it."""
    one = make_recipe(tmp_path, small_stages(config))
    other = replace(one, stages=small_stages(config, fetch=replace(config, suffix="?")))
    build(other)
    build(one)
    data, folder = tmp_path / "data", other.stages[0].folder
    assert collect([one], GcOptions()) == []
    for path in (data / folder).rglob("*"):
        if path.suffix == ".tar" or path.parent.name == "records" or path.name == SETTINGS:
            os.utime(path, (0, 0))
    assert [item.folder for item in collect([one], GcOptions())] == []


def test_what_is_not_ours_is_never_touched(tmp_path: Path, config: SmallConfig) -> None:
    one = make_recipe(tmp_path, small_stages(config))
    other = replace(one, stages=small_stages(config, choose=replace(config, least=3)))
    build(other)
    build(one)
    data, folder = tmp_path / "data", other.stages[3].folder
    foreign = [
        data / "notes.txt",
        data / "report" / "index.html",
        data / "mine-0123456789ab" / "a.b.c.d.parquet",
        data / "mine-0123456789ab" / "x.tar",
        data / "photos" / SETTINGS,
        data / folder / "notes.txt",
        data / "runs" / "1" / ".aside-1",
    ]
    for path in foreign:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"mine")
    garbage = collect([one], DELETE)
    assert [item.folder for item in garbage] == [folder] and all(p.exists() for p in foreign)
    assert sorted(p.name for p in (data / folder).iterdir()) == ["notes.txt", SETTINGS], "it still tells whose it was"


def test_the_smaller_partition_file_stays(tmp_path: Path, config: SmallConfig) -> None:
    """A takedown published it and died before it removed the other."""
    recipe = make_recipe(tmp_path, small_stages(config))
    build(recipe)
    partition = ingested(recipe.folder, recipe.source)[0]
    smaller = replace(partition, rows=partition.rows - 1, content_id="f" * 16)
    recipe.folder.write(smaller.parquet, recipe.folder.read(partition.parquet))
    garbage = collect([recipe], DELETE)
    assert Garbage(folder="partitions", why="superseded", files=(partition.parquet,), size=garbage[0].size) in garbage
    assert recipe.folder.exists(smaller.parquet)


def test_absent_keys_stay_while_a_source_names_them(tmp_path: Path, config: SmallConfig) -> None:
    recipe = make_recipe(tmp_path, small_stages(config))
    build(recipe)
    fewer = replace(recipe, source=small_source(tmp_path, urls(12)[2:]))
    build(fewer)
    named = {p.absent for p in ingested(fewer.folder, fewer.source)} - {""}
    recipe.folder.write("sources/absent/000000-00000000.0.parquet", b"of a record that is gone")
    garbage = collect([fewer], DELETE)
    assert [item.files for item in garbage] == [("sources/absent/000000-00000000.0.parquet",)]
    assert named and all(recipe.folder.exists(name) for name in named)


def test_partitions_that_left_the_source(tmp_path: Path, config: SmallConfig) -> None:
    build(make_recipe(tmp_path, small_stages(config)))
    fewer = make_recipe(tmp_path, small_stages(config), count=5)
    build(fewer)
    garbage = collect([fewer], DELETE)
    assert "no source of the recipes given lists it" in {item.why for item in garbage}
    kept = [name for name in fewer.folder.list("partitions") if name.endswith(".parquet")]
    assert plan_of(fewer).is_empty and len(kept) == 3


class Facts(Small):
    """Writes what a view asks for."""

    name = "facts"
    reads = ("image",)
    writes = pa.schema(
        [
            *((name, pa.int32()) for name in ("width", "height")),
            *((name, pa.float32()) for name in ("clip_score", "alt_score")),
            ("alt_supported", pa.bool_()),
        ]
    )
    drops = False

    def process(self, batch: pa.Table) -> Any:
        self.note(batch)
        ones = [1] * batch.num_rows
        return {name: ones if name != "alt_supported" else [True] * batch.num_rows for name in self.writes.names}


class SmallPack(Pack):
    """Packs the bytes as they are."""

    def load(self) -> None:
        self._resize = lambda data: (data.read(), 1, 1, None, None, None)


def packing(config: SmallConfig, where: str, **changed: SmallConfig) -> list[Stage]:
    view = PackConfig(view="v", resolution=1, tokenizers=(), where=where)
    return [*small_stages(config, **changed), Facts(config), SmallPack(view)]


def save_checkpoint(folder: Path, digest: str, held_out: str = "") -> None:
    path = folder / "runs" / "tsc" / "checkpoint-000000010" / "checkpoint.json"
    path.parent.mkdir(parents=True)
    facts = {"phases": [{"views": {"v": {"manifest_sha256": digest}}}]}
    path.write_text(json.dumps({"facts": facts, "state": {"held_out": held_out}}))


@pytest.mark.parametrize("held_out", [False, True])
def test_a_views_present_version_stays_and_one_that_a_training_goes_on_with(
    tmp_path: Path, config: SmallConfig, held_out: bool
) -> None:
    first = make_recipe(tmp_path, packing(config, "true"))
    versions: list[View] = []
    for where, count in (("true", 12), ("length > 12", 12), ("length > 12", 17), ("true", 17)):
        recipe = make_recipe(tmp_path, packing(config, where.replace("length", "length(caption)")), count)
        build(recipe)
        versions.append(View.open(recipe.folder, "v"))
        versions[-1].manifest  # noqa: B018 - read while it is there
    present = make_recipe(tmp_path, packing(config, "length(caption) > 12"), 17)
    assert len({v.info.version for v in versions}) == 4
    known = [versions[0].info.manifest_sha256, "of another dataset"]
    save_checkpoint(tmp_path, *reversed(known) if held_out else known)
    assert trained_manifests(tmp_path / "runs") == {*known}
    garbage = collect([present], DELETE)
    whys_of = {path: item.why for item in garbage for path in item.files}
    # The pointer names the last one built, though this recipe's own is another; and a training holds the first.
    assert {p for p, why in whys_of.items() if why == "old view version"} == {v.info.manifest for v in versions[1:3]}
    for view in (versions[0], versions[3]):
        assert all(view.read(row, "image") for row in range(len(view)))
    assert plan_of(present).is_empty
    shutil.rmtree(tmp_path / "runs")
    build(first)
    build(present)
    assert first.stages[-1].folder in {item.folder for item in collect([present], DELETE)}
    assert not (tmp_path / "data" / first.stages[-1].folder).exists()


def test_a_view_that_no_recipe_has_goes_with_its_pointer(tmp_path: Path, config: SmallConfig) -> None:
    packed = make_recipe(tmp_path, packing(config, "true"))
    build(packed)
    plain = replace(packed, stages=packed.stages[:4])
    assert "views/v.json" in {path for item in collect([plain], DELETE) for path in item.files}
    assert packed.folder.list("views") == [] and plan_of(plain).is_empty


def test_a_view_that_a_training_validates_with_stays(tmp_path: Path, config: SmallConfig) -> None:
    packed = make_recipe(tmp_path, packing(config, "true"))
    build(packed)
    training = training_config(tmp_path, validation=ValidationConfig(every=12, resolution=8, view="v"))
    trains = replace(packed, stages=packed.stages[:4], trainings={"tsc": training})
    assert not {path for item in collect([trains], DELETE) for path in item.files if path.startswith("views/v")}


@pytest.mark.parametrize("data", [b"", b"[1]", b"{}", b"\xff"])
def test_notes_of_others_stay_and_a_damaged_pointer_is_named(tmp_path: Path, config: SmallConfig, data: bytes) -> None:
    recipe = make_recipe(tmp_path, packing(config, "true"), count=5)
    build(recipe)
    for name in ("sources/notes.json", "views/notes.json"):
        recipe.folder.write(name, data)
    assert collect([recipe], NOW) == []
    recipe.folder.write("views/v.json", data)
    with pytest.raises(ValueError, match=r"views/v\.json is damaged"):
        collect([recipe], DELETE)


def test_a_dataset_elsewhere(tmp_path: Path, config: SmallConfig) -> None:
    one = make_recipe(tmp_path, small_stages(config), url=f"memory://{uuid.uuid4().hex}/data")
    other = replace(one, stages=small_stages(config, describe=replace(config, suffix="!")))
    build(other)
    build(one)
    assert collect([one], GcOptions()) == [] and whys(collect([one], DELETE))["describe"].startswith("older settings")
    assert plan_of(one).is_empty and not list_tables(one.folder, other.stages[2].folder, with_tar=False)


@settings(max_examples=12, deadline=None)
@given(
    history=st.lists(
        st.tuples(
            st.sampled_from(["", "?"]), st.sampled_from(["", "!"]), st.sampled_from([0, 11]), st.sampled_from([6, 9]),
            st.sampled_from([None, 1]),
        ),
        min_size=1, max_size=4,
    ),
    chosen=st.sets(st.integers(0, 3), min_size=1),
)  # fmt: skip
def test_whatever_was_built_the_plans_stay_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, history: list[tuple[str, str, int, int, int | None]], chosen: set[int]
) -> None:
    folder, config = tmp_path_factory.mktemp("gc"), SmallConfig()
    recipes = []
    for fetch, describe, least, count, only in history:
        changed = {"fetch": replace(config, suffix=fetch), "describe": replace(config, suffix=describe)}
        stages = small_stages(config, **changed, choose=replace(config, least=least))
        recipes.append(make_recipe(folder, stages, count))
        build(recipes[-1], only)
    named = [recipes[n % len(recipes)] for n in chosen]
    before = [state(recipe) for recipe in named]
    collect(named, DELETE)
    assert [state(recipe) for recipe in named] == before
    assert collect(named, NOW) == []


def test_the_command_line(tmp_path: Path, config: SmallConfig, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    monkeypatch.setenv("SMALL_FOLDER", str(tmp_path))
    small_source(tmp_path, urls(6))

    def job(*argv: str) -> str:
        with pytest.raises(SystemExit) as ended:
            run_job(argv[0], list(argv[1:]))
        said = capsys.readouterr()
        return f"{ended.value.code} {' '.join((said.out + said.err).split())}"

    recipe, age = "tests/small_recipe.py", ["--min-age-hours", "0"]
    job("build", recipe, "--runner", "local", "--choose.least", "3")
    job("build", recipe, "--runner", "local")
    none = f"0 0 checkpoints found in {tmp_path / 'runs'}"
    assert job("gc", recipe) == f"{none} nothing to delete"
    shown = job("gc", recipe, *age)
    assert "would be deleted" in shown and "least 3 → 11" in shown and "add --delete" in shown
    told = json.loads(job("gc", recipe, recipe, *age, "--json").removeprefix("0 "))
    assert [item["why"] for item in told["garbage"]] == ["older settings: least 3 → 11"] and told["bytes"] > 0
    assert job("gc", recipe, *age, "--choose.least", "3").count("least 11 → 3") == 1
    assert "deleted" in job("gc", recipe, *age, "--delete", recipe)
    assert job("gc", recipe, *age) == f"{none} nothing to delete"
    assert job("gc", "--help").startswith("0 usage: densebridge gc RECIPE [RECIPE ...] [OPTIONS]")
    assert "[RECIPE ...]" in job("gc", recipe, "--help")
    elsewhere = tmp_path / "elsewhere.py"
    elsewhere.write_text(
        "from dataclasses import replace\nfrom tests.small_recipe import recipe\nrecipe = replace(recipe, dataset='other')"
    )
    assert "give recipes of one folder" in job("gc", recipe, str(elsewhere))
    assert "min_age_hours cannot be negative" in job("gc", recipe, "--min-age-hours", "-1")
