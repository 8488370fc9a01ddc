"""`densebridge cost`: which figure counts, what is printed and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from examples.shapes.recipe import T5_MODEL, TSC, training
from jobs.build import BuildOptions, build
from jobs.cost import CostOptions, as_json, find_costs, main
from jobs.costs.anchors import anchor_of, picture_bytes
from jobs.costs.figures import read_pair, read_pairs
from jobs.costs.table import print_costs
from jobs.dense_captions import captioned_pictures
from jobs.recipe import Recipe
from pipeline.stage import Needs
from stages.captioning.with_openai import OpenAIConfig
from stages.captioning.with_vllm import VLLMConfig
from stages.recaption import Recaption, RecaptionConfig
from tests.small_stages import SmallConfig, small_source, small_stages, urls

STATED = ("fetch=100", "first=1e4", "describe=10", "choose=1e3")


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    config = SmallConfig()
    stages = small_stages(config, describe=SmallConfig(needs=Needs(gpus=1.0, actors=(1, 4))))
    source = small_source(tmp_path, urls(40))
    return Recipe(name="small", dataset=str(tmp_path / "dataset"), source=source, stages=stages)


def test_what_is_stated_counts_before_what_was_measured(recipe: Recipe) -> None:
    build(recipe, BuildOptions(runner="local"))
    found = find_costs(recipe, CostOptions(rows=1e6, rate=("describe=10",), keep=("fetch=0.5",), size=("choose=7",)))
    fetch, first, describe, choose = (cost.figures for cost in found.stages)
    assert (fetch.keep.value, fetch.keep.origin) == (0.5, "stated")
    assert (describe.rate.value, describe.rate.origin) == (10, "stated")
    assert (choose.size.value, choose.size.origin) == (7, "stated")
    assert first.keep.origin == first.size.origin == "measured"
    assert found.source.origin == "measured" and found.partitions == 200_000


def test_shares_and_sizes_are_those_of_the_dataset(recipe: Recipe) -> None:
    """At its own size the model says what lies there, byte by byte, and which rows came to each stage."""
    build(recipe, BuildOptions(runner="local"))
    found = find_costs(recipe, CostOptions(rate=STATED))
    (run,) = Path(recipe.dataset).glob("runs/*/run.json")
    funnel = json.loads(run.read_text())["stages"]
    assert found.rows == 40
    for cost in found.stages:
        assert cost.rows == pytest.approx(funnel[cost.stage.name]["in"])
        files = [p for p in (Path(recipe.dataset) / cost.stage.folder).rglob("*") if p.suffix in (".parquet", ".tar")]
        assert cost.stored_bytes == pytest.approx(sum(p.stat().st_size for p in files))


def test_without_builds_a_stage_of_no_known_kind_is_left_open(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    options = CostOptions(rows=3.4e7, gpu="a100=2.0")
    found = find_costs(recipe, options)
    assert found.without_rate == ["fetch", "first", "describe", "choose"] and found.money(options.prices) is None
    assert all(cost.rows == 3.4e7 and cost.figures.keep.origin == "assumed" for cost in found.stages)
    print_costs(found, options.prices, gpu="a100")
    told = capsys.readouterr().out
    assert "34,000,000 rows in 6,800,000 partitions" in told and "?" in told
    assert "no rate is known of fetch, first, describe, choose" in told and "no price, so in no money: cores" in told


def test_gpu_hours_and_money_of_stated_rates(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    options = CostOptions(rows=3.6e7, gpu="a100=2.0", rate=STATED, gpus=2.0)
    found = find_costs(recipe, options)
    assert found.gpu_hours == pytest.approx(1000) and found.money(options.prices) == pytest.approx(2000)
    assert found.wall.limit == "GPUs" and found.wall.seconds == pytest.approx(500 * 3600)
    told = as_json(found, options.prices)
    assert told["stages"]["describe"]["rate"] == {"value": 10, "origin": "stated", "source": ""}
    assert told["total"]["gpu_hours"] == pytest.approx(1000) and told["total"]["stored_bytes"] is None
    print_costs(found, options.prices, gpu="a100")
    assert "time: 500 hours by the GPUs that there are; the others wait for describe" in capsys.readouterr().out


def test_a_training_takes_its_samples_by_the_stated_speed(recipe: Recipe) -> None:
    tsc = training(TSC, T5_MODEL)
    trained = replace(recipe, stages=(), trainings={"tsc": tsc})
    first, second = find_costs(trained, CostOptions(rows=10, rate=("tsc=10", "tsc.1=5"))).phases
    assert first.gpu_hours == pytest.approx(tsc.phases[0].samples / 10 / 3600)
    assert second.gpu_hours == pytest.approx(tsc.phases[1].samples / 5 / 3600)


def test_anchors_are_of_a_whole_gpu_and_a_core() -> None:
    download, deduplicate, embed, recaption, score = captioned_pictures("me@example.org")
    assert anchor_of(download).rate_of(download) == 50 and anchor_of(download).keep == 0.8
    assert anchor_of(embed).rate_of(embed) == pytest.approx(900 * 0.15)
    assert anchor_of(recaption).rate_of(recaption) == pytest.approx(0.75)
    assert anchor_of(deduplicate).source and anchor_of(score).source
    whole = Recaption(RecaptionConfig(engine=VLLMConfig(model="m"), needs=Needs(gpus=1.0)))
    served = Recaption(
        RecaptionConfig(engine=OpenAIConfig(model="m", endpoints=("http://127.0.0.1:1/v1",)), needs=Needs(gpus=0.0))
    )
    assert anchor_of(whole).rate_of(whole) == 10 and anchor_of(served).rate_of(served) is None
    assert picture_bytes(1024) == 4 * picture_bytes(512)
    assert anchor_of(small_stages(SmallConfig())[0]) is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("downlod=0.5", "the recipe has no 'downlod': perhaps you meant download"),
        ("download", "write NAME=a number above 0 and at most 1"),
        ("download=much", "write NAME=a number above 0 and at most 1"),
        ("download=1.5", "at most 1"),
        ("download=nan", "at most 1"),
        ("=0.5", "such as --keep NAME=0.5"),
    ],
)
def test_malformed_words_are_one_line(words: str, said: str) -> None:
    with pytest.raises(ValueError, match=f"^--keep {words}: .*{said}"):
        read_pairs("--keep", [words], ["download"], most=1.0)


def test_prices_and_counts_are_checked(recipe: Recipe) -> None:
    assert read_pair("--gpu", "a100=2.0") == ("a100", 2.0)
    with pytest.raises(ValueError, match=r"^--gpu a100: write NAME=a number above 0"):
        _ = CostOptions(gpu="a100").prices
    for wrong in ({"rows": -1.0}, {"gpus": math.nan}, {"cpu_hour": -0.1}, {"requests_million": (1.0, -1.0)}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} "):
            CostOptions(**wrong)
    with pytest.raises(ValueError, match="has no partitions yet: say for how many rows, such as --rows 34e6"):
        find_costs(recipe, CostOptions())
    with pytest.raises(ValueError, match="--rate describ=1: the recipe has no 'describ': perhaps you meant describe"):
        find_costs(recipe, CostOptions(rows=5, rate=("describ=1",)))


def test_the_command_line_takes_them_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SMALL_FOLDER", str(tmp_path))
    flags = "--rows 34e6 --gpu a100=2.0 --gpus 8 --cpu-hour 0.04 --storage-month 0.023 --requests-million 0.4 5 --egress 0.09"
    given = ["--rate", *STATED, "--keep", "fetch=0.8", "--size", *(f"{s.split('=')[0]}=100" for s in STATED), "--json"]
    assert main(["tests/small_recipe.py", *flags.split(), *given]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["rows"] == 34e6 and told["total"]["money"] > 0 and told["total"]["money_a_month"] > 0
    assert told["stages"]["first"]["rows"] == pytest.approx(0.8 * 34e6) and told["without_rate"] == []
