"""The table of how much the texts say: which texts, counted how, and what is said where a counter is missing."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from examples.shapes.recipe import JUDGE
from jobs import caption_statistics
from jobs.caption_statistics import ELLA, caption_table, load_counter, load_tagger, means, sample_texts
from pipeline.plan import Plan, make_plan
from pipeline.runner import run_plan
from pipeline.stage import Columns, Stage
from pipeline.storage import Folder
from stages.ingest import ingest
from stages.score import Score, ScoreConfig
from stages.source import Source
from tests.small_stages import SmallConfig

CAPTION = "A large brown dog slowly walks over a wet street in front of two very old red houses."
# nouns: dog, street, front, houses; adjectives and adverbs: large brown slowly wet very old red; prepositions: over in of


class Captioner(Stage):
    """url → a caption; of every fourth sample none."""

    name = "captioner"
    reads = ("url",)
    writes = pa.schema([("caption", pa.string()), ("short_caption", pa.string())])

    def process(self, batch: pa.Table) -> Columns:
        urls = batch.column("url").to_pylist()
        dropped = [url.endswith(("3", "7")) for url in urls]
        return {
            "caption": ["I cannot." if d else CAPTION for d in dropped],
            "short_caption": ["A dog." if url.endswith(("0", "2", "4")) else None for url in urls],
            "status": ["dropped" if d else "kept" for d in dropped],
            "reason": ["caption_refused" if d else None for d in dropped],
        }


class Shortener(Stage):
    """caption → its first words, as pruning might leave it."""

    name = "shortener"
    reads = ("caption",)
    writes = pa.schema([("caption", pa.string())])

    def process(self, batch: pa.Table) -> Columns:
        return {"caption": [c[:17] for c in batch.column("caption").to_pylist()]}


def built(folder: Path, stages: tuple[Stage, ...]) -> tuple[Folder, Plan]:
    texts = ["A dog in Paris" if n % 2 else " " for n in range(9)]
    table = pa.table({"url": [f"https://host.example/{n}" for n in range(9)], "text": texts})
    pq.write_table(table, folder / "source.parquet")
    dataset, source = Folder(url=str(folder / "dataset")), Source(path=str(folder / "source.parquet"), partition_size=4)
    partitions = ingest(dataset, source)
    run_plan(dataset, stages, make_plan(dataset, stages, partitions), lambda _: None, runner="local")
    return dataset, make_plan(dataset, stages, partitions)


def test_texts_are_those_of_captions_that_were_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = (Captioner(SmallConfig()),)
    dataset, plan = built(tmp_path, stages)
    found = sample_texts(dataset, stages, plan.tickets)
    assert {name: len(texts) for name, texts in found.items()} == {"alt texts": 2, "captions": 7, "short captions": 3}
    assert set(found["captions"]) == {CAPTION}
    monkeypatch.setattr(caption_statistics, "SAMPLE", 3)
    assert len(sample_texts(dataset, stages, plan.tickets)["captions"]) == 3


def test_a_caption_that_a_later_stage_wrote_again_counts(tmp_path: Path) -> None:
    stages = (Captioner(SmallConfig()), Shortener(SmallConfig()))
    dataset, plan = built(tmp_path, stages)
    table = caption_table(dataset, stages, plan.tickets)
    assert table and {row.name: row.words for row in table.rows}["captions"] == 4


def test_the_table_stands_beside_ellas(tmp_path: Path) -> None:
    stages = (Captioner(SmallConfig()), Score(ScoreConfig(model=JUDGE)))
    dataset, plan = built(tmp_path, stages[:1])
    table = caption_table(dataset, stages, plan.tickets)
    assert table and table.rows[-4:] == ELLA
    alts, captions, short = table.rows[:3]
    assert (alts.words, captions.words, short.words) == (4, 18, 2)
    assert captions.nouns == pytest.approx(4, abs=1) and captions.adjectives == pytest.approx(7, abs=1)
    assert captions.prepositions == 3 and captions.tokens and captions.tokens > alts.tokens > 0  # type: ignore[operator]
    assert list(table.columns) == ["words", "nouns", "adjectives", "prepositions", "tokens"]
    assert table.notes[0].startswith("Tagged by TextBlob") and table.notes[1] == "Tokens of clip."
    assert caption_table(dataset, stages, []) is None


def test_published_rows_are_the_papers() -> None:
    assert [(r.words, r.nouns, r.adjectives, r.prepositions, r.tokens) for r in ELLA[1::2]] == [
        (49.87, 15.51, 8.06, 6.26, 62.33), (50.71, 15.71, 8.06, 6.38, 63.05)
    ]  # fmt: skip


def test_what_is_missing_leaves_its_columns_out_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = (Captioner(SmallConfig()),)
    dataset, plan = built(tmp_path, stages)
    load = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("textblob"):
            raise ModuleNotFoundError(name)
        return load(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    for name in [m for m in sys.modules if m.startswith("textblob")]:
        monkeypatch.delitem(sys.modules, name)
    table = caption_table(dataset, stages, plan.tickets)
    assert table and list(table.columns) == ["words"]
    assert "pip install 'densebridge[report]'" in table.notes[0] and "no score stage" in table.notes[1]
    count, note = load_counter([Score(ScoreConfig(model="nobody/has-this-model"))])
    assert count is None and note.startswith("Tokens are not counted: the tokenizer of has-this-model")

    def needy(*_: Any, **__: Any) -> None:
        raise ImportError("\nSlowTokenizer requires the X library\nbut it was not found.")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", needy)
    count, note = load_counter([Score(ScoreConfig(model="nobody/has-this-library"))])
    assert count is None and "asks for a library that is missing (SlowTokenizer requires the X library but" in note


def test_means_are_of_texts_not_of_words() -> None:
    tag, _ = load_tagger()
    row = means("x", ["A red dog.", "Dogs and cats sit under trees."], tag, lambda texts: [len(t) for t in texts])
    assert (row.words, row.nouns, row.adjectives, row.prepositions, row.tokens) == (4.5, 2.0, 0.5, 0.5, 20.0)
