"""The published recipes find their things by the environment, and in one dataset folder do the same work once."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.dense_captions import captioned_pictures, no_judge, places
from jobs.recipe import RECIPES, load_recipe
from pipeline.stage import check_stages
from stages.download import Download
from stages.pack import Pack

NAMES = sorted(path.stem for path in RECIPES.glob("*.py") if path.stem != "__init__")


def test_places_are_those_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SOURCE", "DATASET", "RUNS", "CONTACT"):
        monkeypatch.setenv(f"DENSEBRIDGE_{name}", name.lower())
    found = places("mine")
    assert (found.source.path, found.dataset, found.runs, found.contact) == (
        "source", "dataset", "runs/mine", "contact",
    )  # fmt: skip
    monkeypatch.delenv("DENSEBRIDGE_CONTACT")
    assert places("mine").contact == "set DENSEBRIDGE_CONTACT"


def test_the_shared_stages_fit_together() -> None:
    stages = captioned_pictures("you@example.org")
    check_stages(stages)
    assert [stage.name for stage in stages] == ["download", "deduplicate", "embed", "recaption", "score"]
    assert isinstance(stages[0], Download) and "you@example.org" in stages[0].config.fetch.user_agent


def test_recipes_share_all_but_tokens_and_views(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DENSEBRIDGE_DATASET", str(tmp_path))
    monkeypatch.setenv("DENSEBRIDGE_RUNS", str(tmp_path / "runs"))
    recipes = [load_recipe(name) for name in NAMES]
    assert len({recipe.dataset for recipe in recipes}) == 1 and len({recipe.runs for recipe in recipes}) == len(NAMES)
    assert len({tuple(stage.folder for stage in recipe.stages[:5]) for recipe in recipes}) == 1
    packs = {(stage.config.view, stage.folder) for r in recipes for stage in r.stages if isinstance(stage, Pack)}
    assert len(packs) == len({view for view, _ in packs})  # a name stands for one view


def test_there_is_no_judge() -> None:
    with pytest.raises(ValueError, match="has no judge: draw with `densebridge generate`"):
        no_judge()
