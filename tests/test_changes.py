"""Every kind of change recomputes the least possible: the real stages of the shapes world, and the rows that each is given."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from examples.shapes import recipe as shapes
from examples.shapes.server import serve
from examples.shapes.source import ShapesSource, write_source
from jobs.build import BuildOptions, build
from jobs.recipe import Recipe
from pipeline import tables
from pipeline.shards import View
from pipeline.stage import Stage
from pipeline.storage import Folder
from pipeline.tables import read_parquet
from stages.ingest import ingested

ROWS = 60
SHORT = replace(shapes.T5, max_length=64)
RECAPTION = next(s.config for s in shapes.STAGES if s.name == "recaption")
CAPTIONER = RECAPTION.engine
AFTER_CAPTIONS = {"recaption", "score", "pretokenize_t5", "pretokenize_clip", "clip_filter", "pack_16", "pack_24"}


class World:
    """A dataset of the shapes world, the table it comes from, and the rows that each stage is given from now on."""

    def __init__(self, folder: Path, table: pa.Table) -> None:
        self.folder, self.table = folder, table
        self.seen: dict[str, set[str]] = {}

    def recipe(self, changed: dict[str, dict[str, Any]] | None = None) -> Recipe:
        """The recipe, with other settings of the stages named."""
        stages = []
        for stage in shapes.STAGES:
            fields = (changed or {}).get(stage.name, {})
            stages.append(self._counted(type(stage)(replace(stage.config, **fields))))
        path = self.folder / "source.parquet"
        pq.write_table(self.table, path)
        return replace(
            shapes.recipe,
            dataset=str(self.folder / "dataset"),
            source=replace(shapes.recipe.source, path=str(path), partition_size=25),
            stages=tuple(stages),
        )

    def _counted(self, stage: Stage) -> Stage:
        process = stage.process

        def counting(batch: pa.Table) -> Any:
            self.seen.setdefault(stage.name, set()).update(batch.column("key").to_pylist())
            return process(batch)

        stage.process = counting  # type: ignore[method-assign]
        return stage

    def build(self, recipe: Recipe, **options: Any) -> dict[str, set[str]]:
        """Builds, and returns the keys that each stage was given."""
        self.seen = {}
        build(recipe, BuildOptions(runner="local", **options))
        return self.seen

    def change(self, changed: dict[str, dict[str, Any]]) -> dict[str, set[str]]:
        """What a build with other settings gives the stages; and that putting them back costs nothing."""
        found = self.build(self.recipe(changed))
        assert not self.build(self.recipe())
        return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder, source = tmp_path_factory.mktemp("changes"), ShapesSource(count=ROWS, slow=0.0)
    with serve(source) as url:
        write_source(source, url, folder / "all.parquet")
        whole = pq.read_table(folder / "all.parquet")
        made = World(folder, whole.slice(0, 50))
        made.build(made.recipe())
        yield made


def keys_of(world: World) -> set[str]:
    dataset, source = Folder(url=str(world.folder / "dataset")), world.recipe().source
    return {
        k
        for p in ingested(dataset, source)
        for k in read_parquet(dataset, p.parquet, ["key"]).column("key").to_pylist()
    }


def test_nothing_opens_no_data_file(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = world.recipe()
    build(recipe, BuildOptions(runner="local"))  # its source has another time of change now, which is looked into once
    for place in (tables, pq):
        monkeypatch.setattr(place, "read_table", lambda *a, **k: pytest.fail("a data file was opened"))
    monkeypatch.setattr(Folder, "read_ranges", lambda *a: pytest.fail("a tar was opened"))
    monkeypatch.setattr(pq, "ParquetFile", lambda *a, **k: pytest.fail("a data file was opened"))
    world.seen = {}
    build(recipe, BuildOptions(runner="local"))
    assert not world.seen and "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "redone"),
    [
        ({"recaption": {"engine": replace(CAPTIONER, max_new_tokens=60)}}, AFTER_CAPTIONS),
        ({"recaption": {"prompts": RECAPTION.prompts[:1]}}, AFTER_CAPTIONS),
        ({"clip_filter": {"min_score": 0.0}}, {"clip_filter", "pack_16", "pack_24"}),
        ({"pack_24": {"where": "clip_score >= 0.7"}}, {"pack_24"}),
        (
            {
                "pretokenize_t5": {"tokenizer": SHORT},
                "pack_16": {"tokenizers": (SHORT, shapes.CLIP)},
                "pack_24": {"tokenizers": (SHORT, shapes.CLIP)},
            },
            {"pretokenize_t5", "pack_16", "pack_24"},
        ),
        ({"pack_24": {"resolution": 20}}, {"pack_24"}),
        ({"recaption": {"batch_size": 7}, "download": {"batch_size": 9}, "score": {"device": "cpu"}}, set()),
        ({"recaption": {"engine": replace(CAPTIONER, batch_size=5, device="cpu")}}, set()),
        ({"embed": {"batch_size": 3, "needs": shapes.SMALL}}, set()),
    ],
    ids=lambda value: "+".join(f"{k}.{f}" for k, v in value.items() for f in v) if isinstance(value, dict) else "",
)
def test_a_setting_redoes_what_depends_on_it(
    world: World, changed: dict[str, dict[str, Any]], redone: set[str]
) -> None:
    """And no more: no download, no score of the picture alone, no model before the packing. Put back, it costs nothing."""
    assert set(world.change(changed)) == redone


def test_rows_with_equal_outputs_stop_the_wave(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage's version, raised: its rows are made again, and where they say the same, nothing after it is."""
    recaption = type(next(s for s in shapes.STAGES if s.name == "recaption"))
    with monkeypatch.context() as patched:
        patched.setattr(recaption, "version", recaption.version + 1)
        assert set(world.build(world.recipe())) == {"recaption"}
    process, marked = recaption.process, {}

    def other(self: Stage, batch: pa.Table) -> Any:
        found = dict(process(self, batch))
        marked[batch.column("key")[0].as_py()] = found["caption"][0] + " And more."
        found["caption"] = [marked[batch.column("key")[0].as_py()], *found["caption"][1:]]
        return found

    with monkeypatch.context() as patched:
        patched.setattr(recaption, "version", recaption.version + 2)
        patched.setattr(recaption, "process", other)
        seen = world.build(world.recipe())
    assert len(seen["recaption"]) > len(marked) and all(seen[s] == set(marked) for s in ("score", "pretokenize_t5"))


def test_rows_come_and_go(world: World) -> None:
    """New rows anywhere in the list, in any order: they alone are worked on. Removed ones:
    only the packing knows, and the look at digests, for a picture may be listed twice.
    """
    first, before = world.table, keys_of(world)
    whole = pq.read_table(world.folder / "all.parquet")
    mixed = list(range(whole.num_rows))
    random.Random(1).shuffle(mixed)
    world.table = whole.take(pa.array(mixed))
    new = {k for stage in world.build(world.recipe()).values() for k in stage} - before
    assert world.seen["download"] == new and len(new) == len(keys_of(world)) - len(before) > 0
    assert all(given <= new for name, given in world.seen.items() if name != "deduplicate")

    world.table = pa.concat_tables([whole.slice(30), whole.slice(30).take(pa.array([3, 2, 1])), whole.slice(0, 30)])
    assert not world.build(world.recipe())  # another order, and some of them twice

    listed = packed(world)
    world.table = whole.slice(5)
    assert not set(world.build(world.recipe())) - {"deduplicate", "pack_16", "pack_24"}
    gone = {row["url"] for row in whole.slice(0, 5).to_pylist()} - {row["url"] for row in world.table.to_pylist()}
    assert gone & listed and packed(world) == listed - gone
    world.table = whole
    assert set(world.build(world.recipe())) <= {"deduplicate"} and packed(world) == listed
    world.table = first


def packed(world: World) -> set[str]:
    """The URLs in the present version of the view `16`."""
    view = View.open(Folder(url=str(world.folder / "dataset")), "16")
    return {view.facts(row)["url"] for row in range(len(view))}
