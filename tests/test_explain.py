"""One sample's story is what the tables say: every value, every reason, every shard, and what never came to be."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs.cli import run as run_job
from jobs.explain import explain, print_story, shown
from pipeline.plan import make_plan
from pipeline.sample import sample_key
from pipeline.settings import write_settings
from pipeline.stage import Stage
from pipeline.story import Chapter, Story
from pipeline.tables import read_table
from pipeline.tombstones import write_tombstones
from stages.ingest import ingested
from tests.small_stages import Fetch, Small, SmallConfig, small_source, small_stages, urls
from tests.test_garbage import build, make_recipe, packing


@pytest.fixture
def config(tmp_path: Path) -> SmallConfig:
    return SmallConfig(calls=str(tmp_path / "calls"))


def told(story: Story) -> dict[str, Chapter]:
    return {chapter.stage: chapter for chapter in story.chapters}


def test_a_kept_sample(tmp_path: Path, config: SmallConfig) -> None:
    recipe = make_recipe(tmp_path, packing(config, "true"), count=17)
    build(recipe)
    url = urls(17)[1]
    story = explain(recipe, url)
    assert story == explain(recipe, sample_key(url)) == explain(recipe, f" {url} ")
    assert story.key == sample_key(url) and story.source == {"url": url, "text": f"text of {url}"}
    assert story.is_listed and not story.taken_down
    assert {c.outcome for c in story.chapters} == {"kept"} and [c.stage for c in story.chapters] == [
        s.name for s in recipe.stages
    ]
    fetched, place = told(story)["fetch"], told(story)["fetch"].places["image"]
    assert fetched.values == {"size": len(url), "head": url[:9]}
    assert recipe.folder.read_range(place.tar, place.offset, place.size) == url.encode()
    assert fetched.attempts == 1 and fetched.tried_at and fetched.tried_at.endswith("+00:00")
    assert told(story)["describe"].values == {"caption": url.upper()} and told(story)["describe"].attempts is None
    assert told(story)["describe"].settings == {"suffix": "", "least": 0}, "and none that changes nothing"
    (shard,) = story.shards
    packed = shard.places["packed_image_v"]
    assert (shard.view, shard.is_present) == ("v", True)
    assert recipe.folder.read_range(packed.tar, packed.offset, packed.size) == url.encode()


def test_where_every_samples_way_ended(tmp_path: Path, config: SmallConfig) -> None:
    """Held against the tables themselves, for all of a partition's samples."""
    recipe = make_recipe(tmp_path, small_stages(config, choose=replace(config, least=11)), count=5)
    build(recipe)
    plan = make_plan(recipe.folder, recipe.stages, ingested(recipe.folder, recipe.source))
    tables = plan.tickets[0].tables
    ends = {
        (stage, row["key"]): row["status"]
        for stage, table in tables.items()
        for row in read_table(recipe.folder, table).to_pylist()
    }
    outcomes = {}
    for url in urls(5):
        for chapter in explain(recipe, url).chapters:
            outcomes[chapter.stage, sample_key(url)] = chapter.outcome
    assert ends == {spot: outcome for spot, outcome in outcomes.items() if outcome != "not reached"}
    assert len(outcomes) == 20 and "failed" in outcomes.values() and "dropped" in outcomes.values()
    bad = told(explain(recipe, urls(5)[3]))
    assert (bad["fetch"].outcome, bad["fetch"].reason, bad["fetch"].places) == ("failed", "bad_url", {})
    assert bad["choose"].reason == "failed by fetch: bad_url"


class Aside(Small):
    """caption → nothing of short ones; stands in nobody's way but that of its readers."""

    name = "aside"
    reads = ("caption",)
    writes = pa.schema([("mood", pa.string())])
    drops = False

    def process(self, batch: pa.Table) -> Any:
        return {"mood": [None], "status": ["dropped"], "reason": ["no_mood"]} if batch.num_rows else {}


class Reader(Aside):
    name = "reader"
    reads = ("mood",)
    writes = pa.schema([("song", pa.string())])


class Bystander(Small):
    name = "bystander"
    reads = ("caption",)
    writes = pa.schema([("letters", pa.int32())])

    def process(self, batch: pa.Table) -> Any:
        return {"letters": [1] * batch.num_rows}


class Echo(Reader):
    name = "echo"
    reads = ("song",)
    writes = pa.schema([("echo", pa.string())])


def test_a_stage_that_drops_nobody_ends_only_what_reads_from_it(tmp_path: Path, config: SmallConfig) -> None:
    config = replace(config, batch_size=1)
    stages = [*small_stages(config)[:3], Aside(config), Reader(config), Bystander(config), Echo(config)]
    whole = make_recipe(tmp_path, stages, count=1)
    for built, bystander in ((4, "not made yet"), (6, "kept")):
        build(replace(whole, stages=whole.stages[:built]))
        story = told(explain(whole, urls(1)[0]))
        outcomes = [story[s].outcome for s in ("aside", "reader", "echo", "bystander")]
        assert outcomes == ["dropped", "not reached", "not reached", bystander]
        assert story["reader"].reason == story["echo"].reason == "dropped by aside: no_mood"


def test_what_is_not_made_yet(tmp_path: Path, config: SmallConfig) -> None:
    recipe = make_recipe(tmp_path, small_stages(config)[:2], count=5)
    build(recipe)
    whole = replace(recipe, stages=small_stages(config))
    good, bad = (told(explain(whole, urls(5)[n])) for n in (1, 3))
    assert [c.outcome for c in good.values()] == ["kept", "kept", "not made yet", "not made yet"]
    assert [c.outcome for c in bad.values()] == ["failed", "not reached", "not reached", "not reached"]


def test_an_older_shard_is_told_from_the_present_one(tmp_path: Path, config: SmallConfig) -> None:
    for where in ("true", "length(caption) > 0"):
        recipe = make_recipe(tmp_path, packing(config, where), count=5)
        build(recipe)
    shards = explain(recipe, urls(5)[1]).shards
    assert [s.is_present for s in shards] == [True, False]
    assert shards[0].places["packed_image_v"].tar.startswith(f"{recipe.stages[-1].folder}/")
    assert explain(recipe, urls(5)[3]).shards == []


@dataclass(frozen=True, kw_only=True)
class AskConfig(SmallConfig):
    """Settings of a stage that asks one of several prompts."""

    prompts: tuple[str, ...] = ("What is it?", "Describe it.")


class Ask(Small):
    """Writes which prompt it asked, and an embedding."""

    name = "ask"
    reads = ("image",)
    writes = pa.schema([("prompt", pa.int16()), ("embedding", pa.list_(pa.float32()))])

    def process(self, batch: pa.Table) -> Any:
        return {"prompt": [1] * batch.num_rows, "embedding": [[0.5, *[0.25] * 99]] * batch.num_rows}


def test_the_very_prompt_and_long_values(
    tmp_path: Path, config: SmallConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(tmp_path, [*small_stages(config)[:2], Ask(AskConfig())], count=5)
    build(recipe)
    story = explain(recipe, urls(5)[1])
    asked = told(story)["ask"]
    assert asked.chosen == {"prompt": "Describe it."} and len(asked.values["embedding"]) == 100
    print_story(story)
    page = " ".join(capsys.readouterr().out.split())
    assert "Describe it." in page and "100 numbers: 0.5, 0.25" in page and page.count("0.25") == 3
    assert len(shown("x" * 1000)) == 160 and shown([1, 2]) == "[1, 2]"


def test_what_the_source_no_longer_lists(tmp_path: Path, config: SmallConfig) -> None:
    build(make_recipe(tmp_path, small_stages(config), count=12))
    recipe = make_recipe(tmp_path, small_stages(config), count=7)
    build(recipe)
    stories = [explain(recipe, urls(12)[n]) for n in (1, 8, 11)]
    assert [s.is_listed for s in stories] == [True, False, False]
    assert stories[1].chapters and not stories[2].chapters, "the last partition is no longer the recipe's at all"
    never = replace(recipe, source=replace(recipe.source, path=str(tmp_path / "never ingested.parquet")))
    assert explain(never, urls(12)[11]).is_listed


def test_what_was_taken_down(tmp_path: Path, config: SmallConfig, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = make_recipe(tmp_path, small_stages(config), count=5)
    build(recipe)
    gone, here = "https://example.org/gone", urls(5)[1]
    write_tombstones(recipe.folder, keys=[sample_key(gone), sample_key(here)], domains=["example.com"])
    assert explain(recipe, sample_key(gone)) == Story(key=sample_key(gone), taken_down="key")
    assert explain(recipe, here).taken_down == "key" and explain(recipe, here).partition
    assert explain(recipe, "https://www.example.com/a.jpg").taken_down == "domain"
    assert not explain(recipe, urls(5)[2]).taken_down
    print_story(explain(recipe, gone))
    assert "taken down (key)" in capsys.readouterr().out


class Hashed(Fetch):
    """Writes the digest of what came, as `download` does."""

    writes = pa.schema([*Fetch.writes, ("sha256", pa.string())])

    def process(self, batch: pa.Table) -> Any:
        return {**super().process(batch), "sha256": [url[-1] for url in batch.column("url").to_pylist()]}


def test_bytes_that_were_taken_down_before_and_after_they_came(tmp_path: Path, config: SmallConfig) -> None:
    stages: list[Stage] = [Hashed(config)]
    recipe = make_recipe(tmp_path, stages, count=5)
    build(recipe)
    write_tombstones(recipe.folder, sha256=["1"])
    assert [explain(recipe, urls(5)[n]).taken_down for n in (1, 2)] == ["sha256", ""]
    build(again := replace(recipe, stages=(Hashed(replace(config, suffix="?")),)))
    assert told(explain(again, urls(5)[1]))["fetch"].reason == "taken_down"
    assert explain(again, urls(5)[1]).taken_down == "sha256"


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    monkeypatch.setenv("SMALL_FOLDER", str(tmp_path))
    small_source(tmp_path, urls(6))

    def job(*argv: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            run_job(argv[0], list(argv[1:]))
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out + said.err

    recipe, url = "tests/small_recipe.py", urls(6)[1]
    job("build", recipe, "--runner", "local")
    code, page = job("explain", recipe, url)
    assert code == 0 and all(word in page for word in (sample_key(url), url.upper(), "10 bytes at 1536 in", "attempts"))
    code, page = job("explain", recipe, url, "--json")
    story = json.loads(page)
    assert story["source"]["url"] == url and story["chapters"][0]["places"]["image"]["size"] == len(url)
    assert job("explain", recipe, "--json", url) == (code, page)
    code, page = job("explain", recipe, "--choose.least", "1000", url, "--json")
    assert json.loads(page)["chapters"][-1]["outcome"] == "not made yet"
    for asked, hint in (("u://nowhere", "as the source spells it"), ("0" * 24, "is it a key of this dataset?")):
        code, said = job("explain", recipe, asked)
        assert code == 1 and len(said.splitlines()) == 1 and f"holds no sample {asked!r}" in said and hint in said
    assert "needs a key or URL after the recipe" in job("explain", recipe, "--json")[1]
    assert "usage: densebridge explain RECIPE KEY_OR_URL [OPTIONS]" in job("explain", "--help")[1]
    assert "KEY_OR_URL" in job("explain", recipe, "--help")[1]


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]"])
def test_a_damaged_view_is_named(tmp_path: Path, config: SmallConfig, data: bytes) -> None:
    recipe = make_recipe(tmp_path, small_stages(config), count=5)
    build(recipe)
    recipe.folder.write("views/v.json", data)
    with pytest.raises(ValueError, match=r"views/v\.json is damaged"):
        explain(recipe, urls(5)[1])


def test_settings_that_nobody_wrote(tmp_path: Path, config: SmallConfig) -> None:
    recipe = make_recipe(tmp_path, small_stages(config), count=5)
    build(recipe)
    recipe.folder.remove(f"{recipe.stages[2].folder}/settings.json")
    assert told(explain(recipe, urls(5)[1]))["describe"].settings is None
    write_settings(recipe.folder, recipe.stages)
    assert told(explain(recipe, urls(5)[1]))["describe"].settings
