"""Compare connectors with the base on held-out prompts: every measure raw, by chance and corrected, with 95 % intervals."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from .display import console
from .drawing import load_drawer, release_folder
from .recipe import Recipe, parse, quiet_libraries

if TYPE_CHECKING:
    import numpy as np

    from training.evaluation.judge import Scores


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Options of `densebridge evaluate`."""

    out: Path | None = None
    """Folder for evaluation.json and the pictures; None is `evaluation` among the recipe's runs."""
    seed: int = 0
    """Of the noise that all arms share; prompt n has seed + n."""
    best: bool = False
    """Draw with the releases that did best in the trainings' validation instead of the last."""


def evaluate(
    recipe: Recipe, seed: int, best: bool = False
) -> tuple[dict[str, dict[str, Scores]], dict[str, np.ndarray]]:
    """Scores {arm: {measure: Scores}} and pictures {arm: uint8 (N, side, side, 3)}; all arms start from the same noise."""
    settings = recipe.evaluation
    if settings is None:
        raise ValueError(f"recipe {recipe.name!r} has no evaluation: add one")
    judge = settings.judge()
    # Now, and not after the first arms' pictures.
    releases = {name: release_folder(recipe, name, best) for name in filter(None, settings.arms.values())}
    prompts = judge.prompts()
    seeds = list(range(seed, seed + len(prompts)))
    scores: dict[str, dict[str, Scores]] = {}
    pictures: dict[str, np.ndarray] = {}
    for name, training in settings.arms.items():
        release = releases[training] if training else None
        pictures[name] = load_drawer(recipe, training, release).draw(prompts, seeds, settings)
        scores[name] = judge.score(pictures[name])
    return scores, pictures


def summarise(scores: Mapping[str, Mapping[str, Scores]]) -> dict[str, dict[str, Any]]:
    """{arm: {measure: {raw, shuffled, corrected, interval of corrected}, n}}."""
    from training.evaluation.compare import interval

    table: dict[str, dict[str, Any]] = {}
    for arm, measures in scores.items():
        table[arm] = {"n": len(next(iter(measures.values())).raw)}
        for measure, found in measures.items():
            spread = interval(found.corrected)
            table[arm][measure] = {
                "raw": float(found.raw.mean()),
                "shuffled": float(found.shuffled.mean()),
                "corrected": spread.mean,
                "interval": [spread.low, spread.high],
            }
    return table


def gains(
    scores: Mapping[str, Mapping[str, Scores]], pairs: Mapping[str, tuple[str, str]]
) -> dict[str, dict[str, Any]]:
    """{pair: {measure: {mean, interval}}} of the paired differences of the corrected measures."""
    from training.evaluation.compare import paired

    table: dict[str, dict[str, Any]] = {}
    for pair, (arm, against) in pairs.items():
        table[pair] = {}
        for measure in scores[arm]:
            spread = paired(scores[arm][measure].corrected, scores[against][measure].corrected)
            table[pair][measure] = {"mean": spread.mean, "interval": [spread.low, spread.high]}
    return table


def print_scores(table: Mapping[str, Mapping[str, Any]]) -> None:
    """A line an arm, a column a measure: corrected [interval], raw and by chance below."""
    measures = [m for m in next(iter(table.values())) if m != "n"]
    shown = Table("arm", *measures, title="corrected [95 % interval] (raw / by chance)", title_justify="left")
    for arm, row in table.items():
        cells = [
            f"{c['corrected']:.3f} [{c['interval'][0]:.3f}, {c['interval'][1]:.3f}]\n({c['raw']:.3f} / {c['shuffled']:.3f})"
            for c in (row[m] for m in measures)
        ]
        shown.add_row(arm, *cells)
    console.print(shown)


def main(argv: list[str]) -> int:
    """Command line."""
    quiet_libraries()
    recipe, options = parse(argv, "evaluate", EvaluateOptions, __doc__ or "", sets="trainings")
    scores, pictures = evaluate(recipe, options.seed, options.best)
    table = summarise(scores)
    assert recipe.evaluation is not None
    against = gains(scores, recipe.evaluation.gains)
    out = options.out or Path(recipe.runs) / "evaluation"
    out.mkdir(parents=True, exist_ok=True)
    (out / "evaluation.json").write_text(json.dumps({"oracle": table, "gain": against}, indent=1))
    save_pictures(out, pictures)
    print_scores(table)
    return 0


def save_pictures(out: Path, pictures: Mapping[str, np.ndarray]) -> None:
    """Each arm's pictures as `<arm>.npy`, uint8 (N, side, side, 3)."""
    import numpy as np

    for arm, drawn in pictures.items():
        np.save(out / f"{arm}.npy", drawn, allow_pickle=False)


if __name__ == "__main__":
    from .cli import run

    run("evaluate", sys.argv[1:])
