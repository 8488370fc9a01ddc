"""What keeps connectors from binding colours: `python -m benchmarks.binding --seeds 0 1 2` after `make demo`.

In the shapes world early connectors placed objects well and coloured them at chance. Two causes were suspected: features of a
language model that hardly tells which colour goes with which thing, and timesteps drawn uniformly, few of them where places
and colours are decided. Here are both, crossed: the TSC on a T5 that learnt to paraphrase alone and on the shipped one (asked
for each word's facts beside it), with uniform and with high-noise timesteps. Trains the first T5 once (about ten minutes).
Prints a table, the effects of both factors on every measure, and, last, one line of JSON, which `--out` keeps.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from examples.shapes.making.language_model import make_language_model
from examples.shapes.recipe import T5_MODEL, TSC, training
from jobs.cli import one_line
from jobs.evaluate import gains, summarise
from jobs.recipe import quiet_libraries
from training.configuration import TimestepConfig, TrainingConfig

from .arms import by_seed, pooled, print_arms, run_arms

GAINS = {
    "language model, uniform timesteps": ("tagged_uniform", "paraphrasing_uniform"),
    "language model, high noise": ("tagged_high_noise", "paraphrasing_high_noise"),
    "timesteps, paraphrasing T5": ("paraphrasing_high_noise", "paraphrasing_uniform"),
    "timesteps, tagged T5": ("tagged_high_noise", "tagged_uniform"),
}


def arms(paraphrasing: Path) -> dict[str, TrainingConfig | None]:
    """The four cells; the tokenizer is the same for both language models."""
    weaker = replace(T5_MODEL, model=str(paraphrasing), tokenizer_model=T5_MODEL.model)
    cells: dict[str, TrainingConfig | None] = {}
    for name, language_model in (("paraphrasing", weaker), ("tagged", T5_MODEL)):
        high = training(TSC, language_model)
        cells[f"{name}_uniform"] = replace(high, timesteps=TimestepConfig(kind="uniform"))
        cells[f"{name}_high_noise"] = high
    return cells


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds")
    parser.add_argument("--jobs", type=int, default=2, help="arms at a time")
    parser.add_argument("--folder", type=Path, default=Path("build/binding"), help="for the runs")
    parser.add_argument("--out", type=Path, help="file for the line of JSON")
    given = parser.parse_args()
    quiet_libraries()
    paraphrasing = given.folder / "paraphrasing_t5"
    if not (paraphrasing / "config.json").is_file():
        make_language_model(paraphrasing, tagging=0.0)
    try:
        seeds = run_arms(arms(paraphrasing), given.seeds, given.folder, given.jobs)
    except (ValueError, OSError) as error:
        raise SystemExit(f"binding: {one_line(error)}") from None
    both = pooled(seeds)
    table, effects = summarise(both), gains(both, GAINS)
    print_arms(table)
    for name, measures in effects.items():
        told = ", ".join(f"{m} {np.round(e['mean'], 3):+.3f}" for m, e in measures.items())
        print(f"{name}: {told}")
    line = json.dumps(
        {
            "seeds": given.seeds,
            "by_seed": by_seed(seeds),
            "oracle": table,
            "effect": effects,
        }
    )
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
