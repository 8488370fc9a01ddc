"""The page: strangers' words stay words, nothing is asked of any network, and what is there is shown."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs import report_charts as charts
from jobs.recipe import Evaluation, Recipe
from jobs.report import keys_shown, main, render, verdict
from jobs.report_data import (
    EXAMPLES,
    PAIRS,
    ScoreSpread,
    TrainingLog,
    caption_pairs,
    ended_examples,
    filter_rules,
    look_up,
)
from jobs.report_pictures import show_bytes, show_pixels
from pipeline.funnel import count_funnel
from pipeline.plan import make_plan
from pipeline.runner import run_plan
from pipeline.sample import sample_key
from pipeline.stage import Columns, Stage
from pipeline.tables import read_table
from stages.clip_filter import ClipFilter, ClipFilterConfig
from stages.deduplicate import Deduplicate, DeduplicateConfig
from stages.ingest import ingest, ingested
from stages.source import Source
from tests.small_stages import SmallConfig
from training.configuration import Phase, TrainingConfig
from training.connectors import MLPConfig
from training.denoisers import DenoiserConfig
from training.evaluation.judge import Scores
from training.language_models import LanguageModelConfig

HOSTILE = '<script>alert("x")</script><img src="http://evil.example/x.png">'
URLS = [
    *(f"https://host.example/good/{n}.jpg" for n in range(12)),
    "https://host.example/good/3.jpg?again",  # the same picture as number 3
    "https://host.example/dim/0.jpg",
    "https://host.example/dim/1.jpg",
    "https://host.example/gone/0.jpg",
    'javascript:alert("gone")',
]


def jpeg(colour: int, side: int = 32) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (side, side), (colour, 90, 200 - colour)).save(out, "JPEG")
    return out.getvalue()


class Camera(Stage):
    """url → image; those with `gone` fail with a 404."""

    name = "camera"
    reads = ("url",)
    writes = pa.schema(
        [("width", pa.int32()), ("height", pa.int32()), ("sha256", pa.string()), ("http_status", pa.int32())]
    )
    payload = {"image": "jpg"}

    def process(self, batch: pa.Table) -> Columns:
        urls = batch.column("url").to_pylist()
        gone = ["gone" in url for url in urls]
        images = [None if g else jpeg(sum(u.split("?")[0].encode()) % 200) for u, g in zip(urls, gone)]
        return {
            "image": images,
            "width": [i and 32 for i in images],
            "height": [i and 32 for i in images],
            "sha256": [i and hashlib.sha256(u.split("?")[0].encode()).hexdigest() for i, u in zip(images, urls)],
            "http_status": [404 if g else 200 for g in gone],
            "status": ["failed" if g else "kept" for g in gone],
            "reason": ["http_404" if g else None for g in gone],
        }


class Talker(Stage):
    """url → a hostile caption and its scores; those with `dim` score low."""

    name = "talker"
    reads = ("url",)
    writes = pa.schema(
        [
            ("caption", pa.string()),
            ("clip_score", pa.float32()),
            ("sentence_scores", pa.list_(pa.float32())),
            ("alt_score", pa.float32()),
        ]
    )

    def process(self, batch: pa.Table) -> Columns:
        urls = batch.column("url").to_pylist()
        scores = [0.1 if "dim" in u else 0.6 for u in urls]
        alts = [0.05 if u.endswith("5.jpg") else 0.4 for u in urls]
        captions = [f"{HOSTILE} {u}" for u in urls]
        return {"caption": captions, "clip_score": scores, "sentence_scores": [[s] for s in scores], "alt_score": alts}


class FullTalker(Talker):
    """As the score stage, with the weakest sentence's score."""

    name = "full_talker"
    writes = Talker.writes.append(pa.field("min_sentence_score", pa.float32()))

    def process(self, batch: pa.Table) -> Columns:
        made = super().process(batch)
        return {**made, "min_sentence_score": made["clip_score"]}


class FourPrompts:
    """A judge that is only asked for its prompts."""

    def prompts(self) -> list[str]:
        return [f"prompt {n} {HOSTILE}" for n in range(4)]

    def score(self, pictures: np.ndarray) -> dict[str, Scores]:
        raise AssertionError("the page scores nothing")


def bare_recipe(folder: Path) -> Recipe:
    small = SmallConfig()
    sieve = ClipFilter(ClipFilterConfig(min_score=0.35, min_alt_score=0.15))
    return Recipe(
        name=f"small {HOSTILE}",
        dataset=str(folder / "dataset"),
        source=Source(path=str(folder / "source.parquet"), partition_size=6),
        stages=(Camera(small), Deduplicate(DeduplicateConfig()), Talker(small), sieve),
        runs=str(folder / "runs"),
    )


def with_training(recipe: Recipe) -> Recipe:
    phases = (
        Phase(view="16", resolution=16, samples=40, batch=4, micro_batch=4),
        Phase(view="24", resolution=24, samples=20, batch=4, micro_batch=4),
    )
    config = TrainingConfig(
        connector=MLPConfig(in_width=8, width=8, use_mask="mask"),
        language_model=LanguageModelConfig(model="none", max_length=8, tokenizer="t5"),
        denoiser=DenoiserConfig(model="none"),
        phases=phases,
    )
    arms = {"base": None, "mlp": "mlp"}
    evaluation = Evaluation(
        judge=FourPrompts,
        base=LanguageModelConfig(model="none"),
        arms=arms,
        gains={"mlp_over_base": ("mlp", "base")},
        resolution=24,
    )
    return replace(recipe, trainings={"mlp": config}, evaluation=evaluation)


def write_runs(recipe: Recipe) -> None:
    run, evaluation = recipe.run_folder("mlp"), Path(recipe.runs) / "evaluation"
    run.mkdir(parents=True)
    evaluation.mkdir()
    lines = [
        {"samples": 4 * n, "phase": int(n > 10), "loss": 1 / n, "bins": [0.5, None, 0.1]} for n in range(1, 16)
    ]  # fmt: skip
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"samples": 6')
    cell = {"raw": 0.5, "shuffled": 0.2, "corrected": 0.3, "interval": [0.25, 0.35]}
    gain = {
        "mlp_over_base": {"fact": {"mean": 0.1, "interval": [0.05, 0.15]}, "full": {"mean": 0, "interval": [-1, 1]}}
    }
    table = {arm: {"n": 4, "fact": cell, "full": cell} for arm in ("base", "mlp")}
    (evaluation / "evaluation.json").write_text(json.dumps({"oracle": table, "gain": gain}))
    for arm in ("base", "mlp"):
        np.save(evaluation / f"{arm}.npy", np.full((4, 24, 24, 3), 99, np.uint8))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("report")
    pq.write_table(pa.table({"url": URLS, "text": [f"alt {HOSTILE}" for _ in URLS]}), folder / "source.parquet")
    made = with_training(bare_recipe(folder))
    plan = make_plan(made.folder, made.stages, ingest(made.folder, made.source))
    run_plan(made.folder, made.stages, plan, lambda _: None, runner="local")
    write_runs(made)
    return made


@pytest.fixture(scope="module")
def page(recipe: Recipe) -> str:
    return render(recipe, f"densebridge report {HOSTILE}")


class Tags(HTMLParser):
    """All tags with their attributes, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data


def words(page: str) -> str:
    return " ".join(Tags(page).text.split())


def test_hostile_words_stay_words(page: str) -> None:
    tags = Tags(page)
    assert "script" not in {tag for tag, _ in tags.found}
    assert "&lt;script&gt;alert(" in page and HOSTILE in tags.text
    assert not [name for _, attrs in tags.found for name in attrs if name.startswith("on")]


def test_nothing_is_asked_of_any_network(page: str) -> None:
    tags = Tags(page).found
    assert not {"link", "iframe", "object", "embed", "base", "form", "image", "use"} & {tag for tag, _ in tags}
    assert all(attrs["src"].startswith("data:image/") for _, attrs in tags if "src" in attrs)
    assert not {"srcset", "poster", "data", "action", "xlink:href"} & {name for _, attrs in tags for name in attrs}
    style = page.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style
    policy = next(a["content"] for t, a in tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")


def test_only_web_addresses_become_links(page: str) -> None:
    links = [attrs for tag, attrs in Tags(page).found if tag == "a" and not attrs["href"].startswith("#")]
    assert links and all(a["href"].startswith("https://") and "noopener" in a["rel"] for a in links)
    assert 'javascript:alert("gone")' in Tags(page).text


def test_funnel_numbers_and_reasons_appear(page: str) -> None:
    text = words(page)
    for shown in ("15 of 17", "14 of 15", "12 of 14", "http_404 2", "duplicate 1", "low_clip_score 2"):
        assert shown in text, shown
    assert "URLs in 17" in text and "samples kept 71% of them 12" in text


def test_examples_come_with_status_score_and_the_original(page: str) -> None:
    text = words(page)
    assert "camera · http_404 failed 2" in text and "HTTP 404" in text
    assert "came first" in text and "score 0.100" in text
    assert "alt text not supported by the picture" in text


class Owners(HTMLParser):
    """Every picture of a sample with the `data-key` that it stands in, the innermost."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        if tag == "img" and not (known["alt"] or "").endswith("drew this"):
            self.found.append((self._open[-1], known["src"] or ""))
        if tag in ("article", "div"):
            self._open.append(known.get("data-key") or (self._open[-1] if self._open else ""))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("article", "div"):
            self._open.pop()


def test_the_page_says_whose_pictures_it_shows(page: str) -> None:
    """For `densebridge forget`: of each picture, also of one that is shown beside its double."""
    pictures = {sample_key(u): jpeg(sum(u.split("?")[0].encode()) % 200) for u in URLS}
    owners = Owners(page).found
    assert len(owners) > 10
    for key, uri in owners:
        shown = show_bytes(pictures[key])
        assert shown and shown.uri == uri
    ended = {sample_key(u) for u in URLS if "good" not in u or "again" in u}
    assert keys_shown(page) == {key for key, _ in owners} | ended


def test_trainings_pictures_and_scores_are_shown(page: str) -> None:
    tags, text = Tags(page).found, words(page)
    assert "mlp · 60 of 60 samples" in text and 'class="phase"' in page and "24 px" in text
    assert sum(attrs.get("alt", "").endswith("drew this") for _, attrs in tags) == 8
    assert "+0.100" in text and "▲ better" in text and "≈ not told apart" in text and "training done of 1 1" in text


def test_the_same_data_gives_the_same_page(recipe: Recipe, page: str) -> None:
    assert render(recipe, f"densebridge report {HOSTILE}") == page


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    text = words(render(with_training(bare_recipe(tmp_path)), "densebridge report"))
    for hint in (
        "Nothing is built yet",
        "No captioned samples",
        "No scores",
        "No training has",
        "No pictures",
        "Nothing is judged",
    ):
        assert hint in text, hint
    text = words(render(bare_recipe(tmp_path), "densebridge report"))
    assert "This recipe has no training" in text and "This recipe has no evaluation" in text


def test_a_changed_setting_is_said_to_be_not_built(recipe: Recipe) -> None:
    sieve = ClipFilter(ClipFilterConfig(min_score=0.5))
    text = words(render(replace(recipe, stages=(*recipe.stages[:-1], sieve)), "densebridge report"))
    assert (
        "samples kept" not in text
        and "clip_filter not built with these settings yet" in text
        and "no filter has judged them yet" in text
    )


def test_the_filters_rules_are_told_whichever_they_are(recipe: Recipe, page: str) -> None:
    assert "The filter asks of a caption a score of at least 0.35: 12 kept of 14, 2 low_clip_score." in words(page)
    changed = {"min_sentence_score": 0.2, "min_gain": 0.3, "cuts": ("alt_score",)}
    assert filter_rules(ClipFilterConfig(**changed)) == (
        "no sentence below 0.2", "a gain over the alt text of at least 0.3", "alt_score at its percentile or above"
    )  # fmt: skip
    for settings, told in (
        ({"min_sentence_score": 0.2}, "asks of a caption no sentence below 0.2: 12 kept of 14, 2 low_sentence_score."),
        ({"min_gain": 0.3}, "asks of a caption a gain over the alt text of at least 0.3: 1 kept of 14, 13 low_gain."),
        ({}, "The filter asks nothing of the scores: 14 kept of 14."),
    ):
        stages = (*recipe.stages[:-1], ClipFilter(ClipFilterConfig(**settings)))
        stages = (*stages[:2], FullTalker(SmallConfig()), stages[-1])
        plan = make_plan(recipe.folder, stages, ingested(recipe.folder, recipe.source))
        run_plan(recipe.folder, stages, plan, lambda _: None, runner="local")
        text = words(render(replace(recipe, stages=stages), "densebridge report"))
        assert told in text and "no filter has judged" not in text and "below it" not in text


def test_examples_of_a_large_dataset_are_looked_for_in_few_partitions(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a group that has no samples there, and of groups that are full, nothing more is read or kept."""
    tickets = make_plan(recipe.folder, recipe.stages, ingested(recipe.folder, recipe.source)).tickets
    funnel = count_funnel(recipe.folder, recipe.stages, tickets)
    read: list[str] = []
    monkeypatch.setattr("jobs.report_data.look_up", lambda *given: {key: key for key in given[-1]})
    monkeypatch.setattr("jobs.report_data._with_originals", lambda *given: given[-1])
    monkeypatch.setattr(
        "jobs.report_data.read_table", lambda *given: read.append(given[1].folder) or read_table(*given)
    )
    monkeypatch.setattr("jobs.report_data.PARTITIONS", 5)
    many = tickets[:1] * 40
    pairs = caption_pairs(recipe.folder, recipe.stages, many)
    assert len(pairs) == PAIRS and len(read) <= 10
    read.clear()
    ends = ended_examples(recipe.folder, recipe.stages, many, funnel)
    assert max(Counter(read).values()) <= 5 and all(len(end.samples) <= EXAMPLES for end in ends)


def test_threshold_parts_the_bars() -> None:
    scores = np.linspace(-0.1, 0.9, 200, dtype=np.float32)
    spread = ScoreSpread(captions=scores, alts=scores[:50], threshold=0.35, alt_threshold=None, row=None)
    drawn = Tags(charts.histogram(spread)).found
    line = next(drawn[n + 1][1] for n, (_, attrs) in enumerate(drawn) if attrs.get("data-threshold") == "min_score")
    for tag, attrs in drawn:
        if tag == "rect":
            side = "kept" if float(attrs["x"]) >= float(line["x1"]) else "dropped"
            assert attrs["class"] == f"fill-{side}"


@pytest.mark.parametrize("values", [[0.3], [0.3, 0.3, 0.3]])
def test_charts_stand_few_and_equal_values(values: list[float]) -> None:
    few = np.array(values)
    spread = ScoreSpread(captions=few, alts=few[:0], threshold=None, alt_threshold=None, row=None)
    assert "nan" not in charts.histogram(spread)
    log = TrainingLog(
        name="one", connector="mlp", total=9, samples=few * 10, losses=few, phases=np.zeros(len(few), int)
    )
    assert "nan" not in charts.loss_curve(log, *charts.loss_range([log])) and not log.is_done
    assert "nan" not in charts.whisker(0.0, [0.0, 0.0], 0.0, 0.0)


def test_pictures_stay_small_and_garbage_is_none() -> None:
    large = show_bytes(jpeg(40, side=900))
    assert large and (large.width, large.height) == (256, 256) and not large.is_tiny
    assert show_bytes(b"no picture") is None and show_bytes(jpeg(40)[:200]) is None
    assert show_pixels(np.zeros((24, 24, 3), np.uint8)).uri.startswith("data:image/png;base64,")


def test_a_difference_is_told_by_its_interval() -> None:
    assert [verdict(i) for i in ([0.1, 0.2], [-0.2, -0.1], [-0.1, 0.1])] == ["better", "worse", "unclear"]


def test_command_writes_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "empty.py"
    file.write_text(
        "from jobs.recipe import Recipe\nfrom stages.source import Source\n"
        f"recipe = Recipe(name='empty', dataset={str(tmp_path / 'd')!r}, source=Source(path='none'), stages=())\n"
    )
    assert main([str(file), "--out", str(tmp_path / "page")]) == 0
    assert [p.name for p in (tmp_path / "page").iterdir()] == ["index.html"]
    assert (
        "Nothing is built yet" in (tmp_path / "page" / "index.html").read_text()
        and "index.html" in capsys.readouterr().out
    )


def test_where_a_sample_is_not_no_table_is_read(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """An original is looked for in partition after partition."""
    monkeypatch.setattr("jobs.report_data.read_table", lambda *_: pytest.fail("a table was read"))
    dataset = recipe.folder
    for ticket in make_plan(dataset, recipe.stages, ingested(dataset, recipe.source)).tickets:
        assert look_up(dataset, recipe.stages, ticket, ["f" * 24]) == {}
