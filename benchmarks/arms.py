"""Arms of the shapes world, trained and judged over seeds, several at a time; what is done stays done."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from examples.shapes.recipe import recipe
from jobs.drawing import load_drawer
from jobs.recipe import Recipe, quiet_libraries
from pipeline.fingerprint import plain
from pipeline.shards import View
from pipeline.storage import Folder
from training.configuration import TrainingConfig
from training.evaluation.judge import Scores

MEASURES = ("full", "fact", "bag", "place", "colour")
"""Of the oracle's, those that are told, the sternest first."""
Arms = Mapping[str, TrainingConfig | None]
Found = dict[str, dict[str, Scores]]
"""{arm: {measure: scores of all prompts}}"""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One arm with one seed."""

    arm: str
    config: TrainingConfig | None
    """None draws with the base alone."""
    seed: int
    folder: Path
    manifests: tuple[str, ...] = ()
    """Digests of the manifests of the views that it trains on."""

    @property
    def path(self) -> Path:
        """Where its scores lie; another configuration, or another build of a view, has another name."""
        made_of = json.dumps([plain(self.config), self.manifests], sort_keys=True)
        digest = hashlib.sha256(made_of.encode()).hexdigest()[:8]
        return self.folder / f"{self.arm}-{self.seed}-{digest}.npz"


def run_arms(arms: Arms, seeds: Sequence[int], folder: Path, jobs: int) -> list[Found]:
    """Scores of every arm, a mapping a seed; `jobs` run at a time, on one thread each."""
    found = {arm: manifests_of(config, recipe.folder) for arm, config in arms.items()}
    tasks = [
        Task(arm=arm, config=config, seed=seed, folder=folder, manifests=found[arm])
        for seed in seeds
        for arm, config in arms.items()
    ]
    missing = [task for task in tasks if not task.path.is_file()]
    if missing:
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
            for done in as_completed([pool.submit(_run, task) for task in missing]):
                print(done.result(), flush=True)
    return [{task.arm: _read(task.path) for task in tasks if task.seed == seed} for seed in seeds]


def manifests_of(config: TrainingConfig | None, dataset: Folder) -> tuple[str, ...]:
    """The digests of the phases' views as the dataset has them now. Raises FileNotFoundError where one is not there."""
    phases = config.phases if config else ()
    return tuple(View.open(dataset, view).info.manifest_sha256 for phase in phases for view in phase.views)


def _run(task: Task) -> str:
    """Trains, draws the judge's prompts from the seed's own noise, scores; a line about it."""
    import torch

    torch.set_num_threads(1)
    quiet_libraries()
    release = None
    if task.config is not None:
        config = replace(task.config, seed=task.seed)
        with contextlib.redirect_stdout(io.StringIO()):
            release = train_in(config, task.path.with_suffix(""))
    scores = judged(with_arm(task), task.arm if task.config else None, release, task.seed)
    task.folder.mkdir(parents=True, exist_ok=True)
    arrays = {f"{measure}/{kind}": getattr(s, kind) for measure, s in scores.items() for kind in ("raw", "shuffled")}
    with task.path.open("wb") as file:
        np.savez(file, **arrays)
    means = ", ".join(f"{measure} {s.corrected.mean():.3f}" for measure, s in scores.items())
    return f"seed {task.seed} {task.arm}: {means}"


def train_in(config: TrainingConfig, run: Path) -> Path:
    """The release of a training on the demo's dataset, as far as it had come before."""
    from training.loop import train

    return train(config, dataset=recipe.folder, run=run).release


def with_arm(task: Task) -> Recipe:
    """The shapes recipe with this arm's training beside its own."""
    return replace(recipe, trainings={**recipe.trainings, **({task.arm: task.config} if task.config else {})})


def judged(with_arms: Recipe, training: str | None, release: Path | None, seed: int) -> dict[str, Scores]:
    """Scores of the judge's prompts; arms of one seed start from the same noise."""
    assert with_arms.evaluation is not None
    judge = with_arms.evaluation.judge()
    prompts = judge.prompts()
    noise = list(range(seed * 10_000, seed * 10_000 + len(prompts)))
    return judge.score(load_drawer(with_arms, training, release).draw(prompts, noise, with_arms.evaluation))


def _read(path: Path) -> dict[str, Scores]:
    with np.load(path, allow_pickle=False) as found:
        measures = {name.split("/")[0] for name in found.files}
        return {m: Scores(raw=found[f"{m}/raw"], shuffled=found[f"{m}/shuffled"]) for m in sorted(measures)}


def pooled(seeds: Sequence[Found]) -> Found:
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


def print_arms(table: Mapping[str, Mapping[str, Any]]) -> None:
    """A line an arm: what it draws right, corrected for chance, with 95 % intervals over prompts."""
    print(f"{'arm':24}" + "".join(f"{measure:>22}" for measure in MEASURES))
    for arm, row in table.items():
        cells = [
            f"{row[m]['corrected']:.3f} [{row[m]['interval'][0]:.3f}, {row[m]['interval'][1]:.3f}]" for m in MEASURES
        ]
        print(f"{arm:24}" + "".join(f"{cell:>22}" for cell in cells))


def by_seed(seeds: Sequence[Found]) -> dict[str, dict[str, list[float]]]:
    """{arm: {measure: the corrected mean of each seed}}, which tells how far training itself scatters."""
    return {
        arm: {m: [round(float(s[arm][m].corrected.mean()), 4) for s in seeds] for m in MEASURES} for arm in seeds[0]
    }
