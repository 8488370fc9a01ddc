"""What CLIP scores can tell, where the truth is known: `python -m benchmarks.filtering --pictures 1000`.

Pictures of the shapes world with dense captions: right ones, another picture's, and right ones in which one sentence is
made wrong in one fact. Measured are `clip_filter` (mismatched pairs dropped), `prune` (wrong sentences pruned), and both
past the 77 tokens that the model reads. Thresholds come from the recipe or from other pictures, half as many, never from
those that are judged. Some minutes on one core. Prints Markdown tables and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from examples.shapes.making.measure import held_out
from examples.shapes.making.pictures import photo_jpeg
from examples.shapes.oracle import read_caption
from examples.shapes.recipe import JUDGE, STAGES
from examples.shapes.words import dense_caption
from examples.shapes.world import COLOURS, GROUNDS, PLACES, SHAPES, SIZES, TEXTURES, Facts, Scenes
from jobs.recipe import quiet_libraries
from pipeline.clip_models import load_half
from stages.clip_filter import ClipFilter, ClipFilterConfig
from stages.embed import Embed, EmbedConfig
from stages.prune import Prune, PruneConfig
from stages.score import Score, ScoreConfig
from stages.sentences import join_sentences, split_sentences

VALUES = {"colour": tuple(COLOURS), "shape": SHAPES, "size": SIZES, "place": PLACES}
KINDS = ("object", *VALUES, "background")
"""What is made wrong. object: one that is not there, colour and shape both; background: its colour and texture."""
EVALUATED, CALIBRATION = 41, 42  # seeds of the pictures
PLANTED = 0.08  # share of mismatched pairs in the world's source
SPENT = 0.05  # share of right sentences that pruning may cost


@dataclass(frozen=True, kw_only=True)
class Case:
    """A picture and a caption."""

    picture: int
    kind: str
    """right, random (another picture's), one of KINDS, or `long_…` where it goes on past the window."""
    caption: str
    wrong: int = -1
    """Place of the sentence that is wrong; -1 where none or all may be."""


def corrupt(
    sentences: list[str], kind: str, facts: Facts, rng: np.random.Generator, first: int = 0
) -> tuple[list[str], int]:
    """The sentences with one of them wrong, and its place, which is `first` or later."""
    claims = [read_caption(s).things for s in sentences]
    spots = [n for n, found in enumerate(claims) if found and n >= first] if kind != "background" else [0]
    spot = int(rng.choice(spots))
    said = sentences[spot]
    if kind == "background":
        grounds = [g for g in GROUNDS if g != facts.ground]
        textures = [t for t in TEXTURES if t != facts.texture]
        said = said.replace(f"{facts.texture} {facts.ground}", f"{rng.choice(textures)} {rng.choice(grounds)}")
    for fact in ("colour", "shape") if kind == "object" else (kind,) if kind in VALUES else ():
        there = {getattr(t, fact) for t in facts.things} if kind == "object" else set()
        is_said = getattr(claims[spot][0], fact)
        others = [v for v in VALUES[fact] if v not in there | {is_said}] or [v for v in VALUES[fact] if v != is_said]
        said = said.replace(is_said, str(rng.choice(others)))
    return [*sentences[:spot], said, *sentences[spot + 1 :]], spot


def make_cases(scenes: Scenes, rng: np.random.Generator, long_from: int) -> list[Case]:
    """All the captions of all the pictures. Long ones say everything twice, in other words, and err past `long_from` words."""
    everything = [scenes.facts(n) for n in range(len(scenes))]
    right = [dense_caption(facts, rng) for facts in everything]
    cases = []
    for n, facts in enumerate(everything):
        other = (n + int(rng.integers(1, len(scenes)))) % len(scenes)
        cases += [Case(picture=n, kind="right", caption=right[n]), Case(picture=n, kind="random", caption=right[other])]
        once = split_sentences(right[n])
        twice = [*once, *split_sentences(dense_caption(facts, rng))]
        start = next(
            (k for k in range(len(twice)) if sum(len(s.split()) + 1 for s in twice[:k]) > long_from), len(twice)
        )
        for prefix, sentences, first in (("", once, 0), ("long_", twice, start)):
            kinds = KINDS if not prefix else KINDS[:-1]
            if not any(read_caption(s).things for s in sentences[first:]):
                continue
            if prefix:
                cases.append(Case(picture=n, kind="long_right", caption=join_sentences(sentences)))
            for kind in kinds:
                made, spot = corrupt(sentences, kind, facts, rng, first)
                cases.append(Case(picture=n, kind=prefix + kind, caption=join_sentences(made), wrong=spot))
    return cases


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Cases with what `score` wrote of them."""

    cases: list[Case]
    table: pa.Table
    seconds: float

    def of(self, kind: str) -> Scored:
        """Those of one kind."""
        spots = [n for n, case in enumerate(self.cases) if case.kind == kind]
        return Scored(cases=[self.cases[n] for n in spots], table=self.table.take(spots), seconds=self.seconds)

    def column(self, name: str) -> np.ndarray:
        """Numbers, one a case."""
        return self.table.column(name).to_numpy()

    def sentences(self, *, relative: bool) -> tuple[np.ndarray, np.ndarray]:
        """Scores of the right and of the wrong sentences, as they are or relative to their caption's mean."""
        right, wrong = list[float](), list[float]()
        for case, listed in zip(self.cases, self.table.column("sentence_scores").to_pylist(), strict=True):
            scores = np.array(listed) - (np.mean(listed) if relative else 0)
            wrong += scores[case.wrong : case.wrong + 1].tolist() if case.wrong >= 0 else []
            right += [s for n, s in enumerate(scores) if n != case.wrong]
        return np.array(right), np.array(wrong)


def measured(count: int, seed: int) -> Scored:
    """`count` pictures, embedded and scored by the stages that a build runs."""
    scenes, rng = held_out(count, (1, 1, 1, 1), seed)
    photos = [photo_jpeg(scenes, n, rng) for n in range(count)]
    cases = make_cases(scenes, rng, long_from=78)
    embed, score = Embed(EmbedConfig(model=JUDGE)), Score(ScoreConfig(model=JUDGE))
    embed.load()
    score.load()
    images = np.stack(
        [
            v
            for n in range(0, count, 128)
            for v in embed.process(pa.table({"image": photos[n : n + 128]}))["image_embedding"]
        ]
    )
    given = pa.table(
        {
            "image_embedding": list(images[[case.picture for case in cases]]),
            "caption": [case.caption for case in cases],
            "text": [""] * len(cases),
        }
    )
    began = time.perf_counter()
    parts = [
        pa.Table.from_pydict(dict(score.process(given.slice(n, 256))), schema=Score.writes)
        for n in range(0, len(cases), 256)
    ]
    seconds = time.perf_counter() - began
    table = pa.concat_tables(parts).append_column("caption", given.column("caption"))
    return Scored(cases=cases, table=table, seconds=seconds)


def auc(right: np.ndarray, wrong: np.ndarray) -> float:
    """Chance that a right one scores above a wrong one; a tie is half."""
    ranked = np.sort(wrong)
    return float(sum(np.searchsorted(ranked, right, side=side).mean() for side in ("left", "right")) / 2 / len(wrong))


def best_threshold(right: np.ndarray, wrong: np.ndarray) -> float:
    """The least score to ask for, at which right ones kept and wrong ones dropped are most, counted alike."""
    candidates = np.unique(np.concatenate([right, wrong]))
    kept = 1 - np.searchsorted(np.sort(right), candidates) / len(right)
    dropped = np.searchsorted(np.sort(wrong), candidates) / len(wrong)
    return round(float(candidates[np.argmax(kept + dropped)]), 4)


def judged_pairs(found: Scored, threshold: float) -> dict[str, dict[str, float]]:
    """By kind what `clip_filter` does to mismatched pairs: precision where they are as many as the right ones, and where they
    are PLANTED of all."""
    sieve = ClipFilter(ClipFilterConfig(min_score=threshold))
    shares = {}
    for kind in ("right", "random", *KINDS):
        shares[kind] = float(np.mean([s == "dropped" for s in sieve.process(found.of(kind).table)["status"]]))
    false, made = shares["right"], {}
    for kind in ("random", *KINDS):
        recall = shares[kind]
        made[kind] = {
            "auc": auc(found.of("right").column("clip_score"), found.of(kind).column("clip_score")),
            "recall": recall,
            "precision": recall / max(recall + false, 1e-9),
            "precision_planted": PLANTED * recall / max(PLANTED * recall + (1 - PLANTED) * false, 1e-9),
        }
    return made


def affordable_rules(found: Scored) -> dict[str, PruneConfig]:
    """The strictest absolute and the strictest relative rule that cost no more than SPENT of the right captions' sentences."""
    right = found.of("right")
    return {
        "min_score": PruneConfig(min_score=round(float(np.quantile(right.sentences(relative=False)[0], SPENT)), 4)),
        "max_below_mean": PruneConfig(
            max_below_mean=round(-float(np.quantile(right.sentences(relative=True)[0], SPENT)), 4)
        ),
    }


def pruned(found: Scored, rule: PruneConfig) -> tuple[float, float]:
    """Precision and recall of `prune` over the sentences of these captions, of which one is wrong in each."""
    hits = taken = 0
    for case, gone in zip(found.cases, Prune(rule).process(found.table)["pruned"], strict=True):
        taken += len(gone)
        hits += split_sentences(case.caption)[case.wrong] in gone
    return hits / max(taken, 1), hits / len(found.cases)


def judged_sentences(found: Scored, rules: dict[str, PruneConfig], prefix: str = "") -> dict[str, dict[str, Any]]:
    """By kind of wrong sentence: how well the sentence, and how well its whole caption, is told from right ones; and what
    each rule prunes."""
    made, right = {}, found.of(f"{prefix}right")
    for kind in KINDS if not prefix else KINDS[:-1]:
        wrong = found.of(prefix + kind)
        made[kind] = {
            "sentence_auc": auc(*wrong.sentences(relative=False)),
            "sentence_auc_relative": auc(*wrong.sentences(relative=True)),
            "caption_auc": {
                name: auc(right.column(name), wrong.column(name))
                for name in ("clip_score", "mean_sentence_score", "min_sentence_score")
            },
            **{
                f"prune_{name}": dict(zip(("precision", "recall"), pruned(wrong, rule))) for name, rule in rules.items()
            },
        }
    return made


def lost(found: Scored, rule: PruneConfig) -> float:
    """Share of the sentences of right captions that the rule prunes."""
    right = found.of("right")
    gone = Prune(rule).process(right.table)["pruned"]
    return sum(map(len, gone)) / sum(len(split_sentences(case.caption)) for case in right.cases)


def padded_speed(captions: list[str]) -> float:
    """Captions a second where each caption and each of its sentences is embedded as it comes, padded to the longest."""
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(JUDGE), load_half(JUDGE, None, "text")
    began = time.perf_counter()
    for start in range(0, len(captions), 256):
        chosen = captions[start : start + 256]
        texts = [*chosen, *(s for caption in chosen for s in split_sentences(caption))]
        model(**tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(model.device))
    return len(captions) / (time.perf_counter() - began)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=1000, help="pictures that are judged")
    count = parser.parse_args().pictures
    if count < 100:
        parser.error("--pictures: at least 100, or the shares mean nothing")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    quiet_libraries()
    calibration, found = measured(count // 2, CALIBRATION), measured(count, EVALUATED)
    recipes = next(float(stage.config.min_score or 0) for stage in STAGES if isinstance(stage, ClipFilter))
    picked = best_threshold(calibration.of("right").column("clip_score"), calibration.of("random").column("clip_score"))
    rules = affordable_rules(calibration)
    numbers = {
        "pictures": count,
        "scored_per_second": len(found.cases) / found.seconds,
        "padded_per_second": padded_speed([case.caption for case in found.cases[:512]]),
        "thresholds": {"recipe": recipes, "calibrated": picked},
        "pairs": {"recipe": judged_pairs(found, recipes), "calibrated": judged_pairs(found, picked)},
        "rules": {"min_score": rules["min_score"].min_score, "max_below_mean": rules["max_below_mean"].max_below_mean},
        "right_sentences_lost": {name: lost(found, rule) for name, rule in rules.items()},
        "sentences": judged_sentences(found, rules),
        "past_the_window": judged_sentences(found, rules, "long_"),
        "long_captions": len(found.of("long_right").cases),
        "long_truncated": float(found.of("long_right").column("clip_truncated").mean()),
    }
    print_tables(numbers)
    print(json.dumps(json.loads(json.dumps(numbers), parse_float=lambda text: round(float(text), 4))))


def print_tables(numbers: dict[str, Any]) -> None:
    """The pairs, the sentences, and the sentences past the window."""
    recipe, picked = numbers["thresholds"].values()
    told = [f"least score {least}: precision, recall" for least in (recipe, picked)]
    print(f"\n| mismatched pair | AUC | {told[0]} | {told[1]} | … precision where {PLANTED:.0%} are mismatched |")
    print("|---|---|---|---|---|")
    for kind, row in numbers["pairs"]["recipe"].items():
        other = numbers["pairs"]["calibrated"][kind]
        cells = [f"{r['precision']:.3f}, {r['recall']:.3f}" for r in (row, other)]
        print(f"| {kind} | {row['auc']:.4f} | {cells[0]} | {cells[1]} | {other['precision_planted']:.3f} |")
    for title, part in (("one wrong sentence", "sentences"), ("past 77 tokens", "past_the_window")):
        print(f"\n| {title} | AUC: whole caption | mean | weakest | sentence | … relative | ", end="")
        print(" | ".join(f"{name} {value}: precision, recall" for name, value in numbers["rules"].items()) + " |")
        print("|---|---|---|---|---|---|---|---|")
        for kind, row in numbers[part].items():
            cells = [*row["caption_auc"].values(), row["sentence_auc"], row["sentence_auc_relative"]]
            rules = [row[f"prune_{name}"] for name in numbers["rules"]]
            shown = [f"{c:.3f}" for c in cells] + [f"{r['precision']:.2f}, {r['recall']:.2f}" for r in rules]
            print(f"| {kind} | {' | '.join(shown)} |")
    lost = ", ".join(f"{name} {share:.3f}" for name, share in numbers["right_sentences_lost"].items())
    print(
        f"\nSentences of right captions that are pruned: {lost}. Past 77 tokens: {numbers['long_captions']} captions."
    )
    print(
        "Captions scored a second: {scored_per_second:.0f}, in one padded pass {padded_per_second:.0f}.\n".format(
            **numbers
        )
    )


if __name__ == "__main__":
    main()
