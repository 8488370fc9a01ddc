"""Scores are kept by what they are of, and summed up over seeds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import arms as arms_module
from benchmarks import binding, connectors
from benchmarks.arms import MEASURES, Found, Task, by_seed, manifests_of, pooled, run_arms
from examples.shapes.recipe import MLP, T5_MODEL, recipe, training
from jobs.evaluate import gains
from pipeline.storage import Folder
from tests.training_fixtures import make_world, training_config
from training.evaluation.judge import Scores


def scores(*raw: float) -> Scores:
    return Scores(raw=np.array(raw), shuffled=np.zeros(len(raw)))


def test_another_configuration_or_another_build_has_another_name(tmp_path: Path) -> None:
    config = training(MLP, T5_MODEL)
    task = Task(arm="mlp", config=config, seed=1, folder=tmp_path, manifests=("a", "b"))
    others = [
        replace(task, config=replace(config, weight_decay=0.5)),
        replace(task, config=None),
        replace(task, seed=2),
        replace(task, manifests=("a", "c")),
        replace(task, manifests=()),
    ]
    assert replace(task).path == task.path and task.path.parent == tmp_path
    assert len({one.path for one in (task, *others)}) == 6


def test_scores_of_an_earlier_build_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, dataset = training_config(make_world(tmp_path)), Folder(url=str(tmp_path / "dataset"))
    before = manifests_of(config, dataset)
    assert len(set(before)) == 2 and manifests_of(None, dataset) == ()
    monkeypatch.setattr(arms_module, "recipe", replace(recipe, dataset=dataset.url))
    with Task(arm="tsc", config=config, seed=0, folder=tmp_path, manifests=before).path.open("wb") as file:
        np.savez(file, **{"full/raw": np.ones(2), "full/shuffled": np.zeros(2)})
    assert run_arms({"tsc": config}, [0], tmp_path, jobs=1)[0]["tsc"]["full"].raw.tolist() == [1, 1]
    info = json.loads(dataset.read("views/large.json")) | {"manifest_sha256": "of another build"}
    dataset.write("views/large.json", json.dumps(info).encode())

    def no_pool(*_: object, **__: object) -> None:
        raise RuntimeError("trains anew")

    monkeypatch.setattr(arms_module, "ProcessPoolExecutor", no_pool)
    with pytest.raises(RuntimeError, match="trains anew"):
        run_arms({"tsc": config}, [0], tmp_path, jobs=1)
    dataset.remove("views/large.json")
    with pytest.raises(FileNotFoundError, match="has no view 'large'"):
        run_arms({"tsc": config}, [0], tmp_path, jobs=1)


def test_scores_are_pooled_over_prompts_and_told_by_seed() -> None:
    one: Found = {"tsc": dict.fromkeys(MEASURES, scores(1.0, 0.0)), "base": dict.fromkeys(MEASURES, scores(0.0, 0.0))}
    two: Found = {"tsc": dict.fromkeys(MEASURES, scores(0.0, 0.0)), "base": dict.fromkeys(MEASURES, scores(0.5, 0.0))}
    both = pooled([one, two])
    assert both["tsc"]["full"].raw.tolist() == [0.5, 0.0] and both["base"]["full"].raw.tolist() == [0.25, 0.0]
    assert both["tsc"]["full"].shuffled.tolist() == [0.0, 0.0]
    assert by_seed([one, two])["tsc"] == {measure: [0.5, 0.0] for measure in MEASURES}
    gain = gains(both, {"tsc_over_base": ("tsc", "base")})
    assert gain["tsc_over_base"]["full"]["mean"] == pytest.approx(0.125)


def test_gains_compare_arms_that_are_there(tmp_path: Path) -> None:
    cells = binding.arms(tmp_path / "paraphrasing")
    assert {arm for pair in connectors.GAINS.values() for arm in pair} <= set(connectors.ARMS)
    assert {arm for pair in binding.GAINS.values() for arm in pair} == set(cells)
    assert len({repr(config) for config in connectors.ARMS.values()}) == len(connectors.ARMS)
    assert len({repr(config) for config in cells.values()}) == 4
