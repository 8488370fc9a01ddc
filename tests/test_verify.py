"""`densebridge verify` says what it read, names what is wrong, and ends with 1 where anything is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.verify import main
from pipeline.storage import Folder
from tests.packing import pack_views

RECIPE = """
from pathlib import Path
from jobs.recipe import Recipe
from stages.source import Source
from tests.packing import views_of

folder = Path({folder!r})
recipe = Recipe(
    name="packed", dataset=str(folder / "dataset"), source=Source(path=str(folder / "source.parquet")),
    stages=tuple(views_of(folder)),
)
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    pack_views(tmp_path, 17, Folder(url=str(tmp_path / "dataset")))
    (tmp_path / "recipe.py").write_text(RECIPE.format(folder=str(tmp_path)))
    return str(tmp_path / "recipe.py")


def test_all_views_of_a_recipe_or_of_a_folder(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for asked in (recipe, str(tmp_path / "dataset")):
        assert main([asked]) == 0
        lines = sorted(capsys.readouterr().out.splitlines())
        assert [line.split(":")[0] for line in lines] == ["view large", "view small"]
        assert "13 samples, 4 shards" in lines[1] and all(line.endswith("all as its manifest says") for line in lines)
    assert main([recipe, "small", "--decode", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["small"]["samples"] == 13


def test_what_is_wrong_is_named(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = sorted((tmp_path / "dataset" / "views").rglob("large-*/*.tar"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert main([recipe]) == 1
    out = capsys.readouterr().out
    assert "view small: 13 samples" in out and "1 problems" in out
    assert f"  length  views/{shard.parent.name}/{shard.name}  -  it is cut after" in out
    assert main([recipe, "small"]) == 0


def test_a_view_that_is_none(recipe: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no view 'smal'"):
        main([recipe, "smal"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="has no view: run"):
        main([str(tmp_path / "empty")])
    with pytest.raises(ValueError, match="threads must be at least 1"):
        main([recipe, "--threads", "0"])
