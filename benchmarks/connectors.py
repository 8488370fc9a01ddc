"""Which text path, at equal samples, over seeds: `python -m benchmarks.connectors --seeds 1 2` after `make demo`.

Trains every arm of the shapes recipe once a seed on the demo's dataset (the same samples for all arms of a seed), draws
the judge's prompts and scores them. About six minutes a seed and arm on one core. Prints a table (mean over prompts and
seeds, corrected for chance) and, last, one line of JSON with every seed's figures and the paired gains.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
from pathlib import Path

import numpy as np

from examples.shapes.recipe import recipe
from jobs.cli import one_line
from jobs.drawing import load_drawer
from jobs.evaluate import gains, print_scores, summarise
from jobs.recipe import quiet_libraries
from training.evaluation.judge import Scores
from training.loop import train


def run_seed(seed: int, folder: Path) -> dict[str, dict[str, Scores]]:
    """Trains and scores all arms with one seed: {arm: {measure: scores}}."""
    assert recipe.evaluation is not None
    judge = recipe.evaluation.judge()
    prompts = judge.prompts()
    noise = list(range(seed * 10_000, seed * 10_000 + len(prompts)))
    found = {}
    for arm, training in recipe.evaluation.arms.items():
        release = None
        if training:
            config = dataclasses.replace(recipe.trainings[training], seed=seed)
            with contextlib.redirect_stdout(io.StringIO()):
                release = train(config, dataset=recipe.folder, run=folder / f"{arm}-{seed}").release
        found[arm] = judge.score(load_drawer(recipe, training, release).draw(prompts, noise, recipe.evaluation))
        print(f"seed {seed} {arm}: full {found[arm]['full'].corrected.mean():.3f}", flush=True)
    return found


def pooled(seeds: list[dict[str, dict[str, Scores]]]) -> dict[str, dict[str, Scores]]:
    """Each prompt's mean over seeds, so that intervals stay over prompts."""
    return {
        arm: {
            measure: Scores(
                raw=np.mean([s[arm][measure].raw for s in seeds], axis=0),
                shuffled=np.mean([s[arm][measure].shuffled for s in seeds], axis=0),
            )
            for measure in measures
        }
        for arm, measures in seeds[0].items()
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2], help="training seeds")
    parser.add_argument("--folder", type=Path, default=Path("build/connectors"), help="for the runs")
    given = parser.parse_args()
    quiet_libraries()
    assert recipe.evaluation is not None
    try:
        seeds = [run_seed(seed, given.folder) for seed in given.seeds]
    except (ValueError, OSError) as error:
        raise SystemExit(f"connectors: {one_line(error)}") from None
    table, gain = summarise(pooled(seeds)), gains(pooled(seeds), recipe.evaluation.gains)
    print_scores(table)
    each = {
        arm: {m: [round(float(s[arm][m].corrected.mean()), 4) for s in seeds] for m in ("fact", "full", "bag")}
        for arm in seeds[0]
    }
    print(json.dumps({"seeds": given.seeds, "by_seed": each, "oracle": table, "gain": gain}))


if __name__ == "__main__":
    main()
