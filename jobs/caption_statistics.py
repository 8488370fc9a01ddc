"""How long and how rich alt texts and captions are, in the columns of ELLA's table 1 (Hu et al. 2024, arXiv 2403.05135).

Means per text. ELLA tagged with NLTK, whose model is not in its package; here TextBlob's lexicon tagger stands in, with the
same Penn tags: nouns are NN*, adjectives and adverbs JJ* and RB*, prepositions IN. Tokens are CLIP's, without the two that
frame a text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.plan import Ticket
from pipeline.stage import Stage
from pipeline.storage import Folder
from pipeline.tables import read_parquet, read_table
from stages.score import Score

SAMPLE = 2000
"""Texts of each kind that are looked at: means of so many have an error of a hundredth or two."""


@dataclass(frozen=True, kw_only=True)
class TextMeans:
    """One row: means over a kind of text. None where what would tell is not there."""

    name: str
    texts: int | None = None
    """How many were looked at; None in ELLA's rows."""
    words: float
    nouns: float | None = None
    adjectives: float | None = None
    """Adverbs too."""
    prepositions: float | None = None
    tokens: float | None = None


ELLA = tuple(
    TextMeans(name=name, words=w, nouns=n, adjectives=a, prepositions=p, tokens=t)
    for name, w, n, a, p, t in (
        ("ELLA: LAION, alt texts", 9.81, 3.59, 0.70, 1.87, 11.88),
        ("ELLA: LAION, captions by CogVLM", 49.87, 15.51, 8.06, 6.26, 62.33),
        ("ELLA: COYO, alt texts", 9.83, 3.60, 0.65, 1.91, 11.89),
        ("ELLA: COYO, captions by CogVLM", 50.71, 15.71, 8.06, 6.38, 63.05),
    )
)
"""As published."""

Tagger = Callable[[str], list[tuple[str, str]]]
Counter = Callable[[list[str]], list[int]]


@dataclass(frozen=True, kw_only=True)
class CaptionTable:
    """The rows, ELLA's last, and what they were made with."""

    rows: tuple[TextMeans, ...]
    notes: tuple[str, ...]
    """Which tagger and tokenizer, or what to do to have one."""

    @property
    def columns(self) -> dict[str, str]:
        """Field → heading, of what is known of the texts at hand."""
        names = {
            "words": "words",
            "nouns": "nouns",
            "adjectives": "adj., adv.",
            "prepositions": "prep.",
            "tokens": "CLIP tokens",
        }
        return {field: name for field, name in names.items() if getattr(self.rows[0], field) is not None}


def caption_table(dataset: Folder, stages: Sequence[Stage], tickets: Sequence[Ticket]) -> CaptionTable | None:
    """The table; None where there are no captions yet. Partitions are read in ingest order, until there are enough texts."""
    kinds = sample_texts(dataset, stages, tickets)
    if not kinds.get("captions"):
        return None
    tag, tagger = load_tagger()
    count, tokenizer = load_counter(stages)
    rows = [means(name, texts, tag, count) for name, texts in kinds.items() if texts]
    return CaptionTable(rows=(*rows, *ELLA), notes=(tagger, tokenizer))


def sample_texts(dataset: Folder, stages: Sequence[Stage], tickets: Sequence[Ticket]) -> dict[str, list[str]]:
    """By kind up to SAMPLE texts: alt texts, captions and, where there are any, short captions, of the same samples. Which
    samples, their keys decide: digests, and so a fair draw.
    """
    writers = [(column, [s for s in stages if column in s.writes.names]) for column in ("caption", "short_caption")]
    found: dict[str, list[pa.Table]] = {column: [] for column in ("text", "caption", "short_caption")}
    for ticket in tickets:
        if sum(t.num_rows for t in found["caption"]) >= SAMPLE:
            break
        # The last that has run: a stage after the captioner may have shortened what it wrote.
        last = {column: [s for s in own if s.name in ticket.tables][-1:] for column, own in writers}
        for column, stage in last.items():
            if stage:
                table = read_table(dataset, ticket.tables[stage[0].name], ["key", "status", column])
                found[column].append(table.filter(pc.equal(table.column("status"), "kept")).select(["key", column]))
        if last["caption"]:
            found["text"].append(read_parquet(dataset, ticket.partition.parquet, ["key", "text"]))
    if not found["caption"]:
        return {}
    keys = pa.concat_tables(found["caption"]).column("key").sort()[:SAMPLE]
    names = {"text": "alt texts", "caption": "captions", "short_caption": "short captions"}
    return {names[column]: _texts(tables, column, keys) for column, tables in found.items() if tables}


def _texts(tables: Sequence[pa.Table], column: str, keys: pa.ChunkedArray) -> list[str]:
    table = pa.concat_tables(tables)
    chosen = table.filter(pc.is_in(table.column("key"), value_set=keys.combine_chunks()))
    return [text for text in chosen.column(column).to_pylist() if text and text.strip()]


def means(name: str, texts: Sequence[str], tag: Tagger | None, count: Counter | None) -> TextMeans:
    """The row of these texts; `tag` gives (word, Penn tag) pairs of a text, `count` the tokens of each."""
    tags = [t for text in texts for _, t in tag(text)] if tag else []

    def share(*kinds: str) -> float | None:
        return sum(t.startswith(kinds) for t in tags) / len(texts) if tag else None

    return TextMeans(
        name=name,
        texts=len(texts),
        words=sum(len(text.split()) for text in texts) / len(texts),
        nouns=share("NN"),
        adjectives=share("JJ", "RB"),
        prepositions=share("IN"),
        tokens=sum(count(list(texts))) / len(texts) if count else None,
    )


def load_tagger() -> tuple[Tagger | None, str]:
    """(the tagger, its name), or (None, what to install)."""
    try:
        from textblob.en.taggers import PatternTagger
    except ModuleNotFoundError:
        return (
            None,
            "Nouns, adjectives and prepositions are counted where TextBlob is: pip install 'densebridge[report]'",
        )
    tagger = PatternTagger()
    return lambda text: tagger.tag(text), f"Tagged by TextBlob {version('textblob')}'s lexicon; ELLA's rows by NLTK."


def load_counter(stages: Sequence[Stage]) -> tuple[Counter | None, str]:
    """(what counts tokens, whose they are), or (None, why not). The tokenizer is that of the CLIP that scores."""
    score = next((s for s in stages if isinstance(s, Score)), None)
    if score is None:
        return None, "Tokens are counted by the tokenizer of the CLIP that scores; the recipe has no score stage."
    from transformers import AutoTokenizer

    name = Path(score.config.model).name
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            score.config.model, revision=score.config.revision, trust_remote_code=False
        )
    except (OSError, ValueError):
        return None, f"Tokens are not counted: the tokenizer of {name} is not on this machine and cannot be fetched."
    except ImportError as error:
        told = " ".join(str(error).split())[:120]
        return None, f"Tokens are not counted: the tokenizer of {name} asks for a library that is missing ({told})."
    return (
        lambda texts: [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]],
        f"Tokens of {name}.",
    )
