"""`densebridge index`: what is up to date stays; what is not is made in a new folder, which takes the old one's place if good.

clip-retrieval itself is in test_clip_retrieval.py; here exact search stands in for it.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs import forget, index
from jobs.clip_retrieval.built import read_built
from jobs.index import IndexOptions, main, make_index
from pipeline.sample import sample_key
from pipeline.tombstones import write_tombstones
from tests.searchable import build, recipe_file, url_of, without_environment


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    without_environment(monkeypatch)


def versions(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def holds(version: Path) -> set[str]:
    """The keys of the index's rows."""
    keys = {key for file in (version / "metadata").iterdir() for key in pq.read_table(file).column("key").to_pylist()}
    assert len(keys) == sum(len(np.load(file)) for file in (version / "img_emb").iterdir())
    return keys


def test_it_is_made_once_and_again_when_the_dataset_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(tmp_path, range(25))
    recipe, folder = recipe_file(tmp_path), tmp_path / "index/photos"
    assert main([recipe]) == 0
    assert f"{folder}: 25 samples, made in" in capsys.readouterr().out
    first = read_built(folder)
    assert first and versions(folder) == [first.version] and sum(first.files.values()) == first.rows == 25
    assert {p.name for p in (folder / first.version).iterdir()} == {
        *("image.index", "text.index", "img_emb", "text_emb", "metadata")
    }
    (folder / "making-of-one-that-died").mkdir()
    (folder / "index-of-one-that-died").mkdir()
    assert main([recipe]) == 0
    assert "25 samples, up to date" in capsys.readouterr().out and read_built(folder) == first
    build(tmp_path, range(3, 30))  # three are no longer listed, five are new
    assert main([recipe, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    second = read_built(folder)
    assert second and told["rows"] == second.rows == 27 and not told["was_there"]
    assert versions(folder) == [second.version] != [first.version]


def test_another_limit_makes_another_index(tmp_path: Path) -> None:
    recipe = build(tmp_path, range(5))
    small = IndexOptions(index_gb=0.5)
    first, _ = make_index(recipe, tmp_path / "i", IndexOptions())
    second, was_there = make_index(recipe, tmp_path / "i", small)
    assert not was_there and first.version != second.version
    assert make_index(recipe, tmp_path / "i", small) == (second, True)


def test_a_bad_index_does_not_take_the_good_ones_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "i"
    first, _ = make_index(build(tmp_path, range(5)), folder, IndexOptions())
    recipe = build(tmp_path, range(6))

    def refuse(*_: object) -> None:
        raise ValueError("its order is not that of the metadata")

    with monkeypatch.context() as patch:
        patch.setattr(index, "check_index", refuse)
        with pytest.raises(ValueError, match="not that of the metadata"):
            make_index(recipe, folder, IndexOptions())
    assert read_built(folder) == first and versions(folder) == [first.version]
    assert make_index(recipe, folder, IndexOptions())[0].rows == 6


def test_a_dataset_that_changes_meanwhile_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, check = build(tmp_path, range(5)), index.check_index

    def change(*args: object) -> object:
        build(tmp_path, range(6))
        return check(*args)

    monkeypatch.setattr(index, "check_index", change)
    with pytest.raises(ValueError, match="was changed while it was indexed: run it again"):
        make_index(recipe, tmp_path / "i", IndexOptions())
    assert read_built(tmp_path / "i") is None and versions(tmp_path / "i") == []


def test_a_takedown_makes_it_stale_and_the_next_is_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(tmp_path, range(10))
    recipe = recipe_file(tmp_path)
    assert main([recipe]) == 0
    (tmp_path / "urls.txt").write_text(url_of(4))
    assert forget.main([recipe, "--urls", str(tmp_path / "urls.txt")]) == 0
    assert (
        f"the index in {tmp_path / 'index/photos'} is stale now: `densebridge index` takes this out;"
        in capsys.readouterr().out
    )
    assert main([recipe]) == 0
    assert "9 samples, made in" in capsys.readouterr().out  # before any build
    built = read_built(tmp_path / "index/photos")
    assert built and holds(tmp_path / "index/photos" / built.version) == {
        sample_key(url_of(n)) for n in range(10) if n != 4
    }
    with pytest.raises(ValueError, match="is not built for 1 of 1 partitions: run `densebridge build` first"):
        main([recipe])
    build(tmp_path, range(10))
    assert main([recipe]) == 0 and "9 samples, made in" in capsys.readouterr().out


def test_a_takedown_that_was_interrupted_is_to_be_ended_first(tmp_path: Path) -> None:
    recipe = build(tmp_path, range(10))
    write_tombstones(recipe.folder, keys=[sample_key(url_of(2))], domains=["pictures0.example"])
    with pytest.raises(ValueError, match=r"still holds 5 samples that were to be taken down: end `densebridge forget`"):
        make_index(recipe, tmp_path / "i", IndexOptions())


def test_nothing_to_index_is_said_in_one_line(tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path)
    with pytest.raises(ValueError, match="holds no dataset of this source yet: run `densebridge build` first"):
        main([recipe])
    assert not (tmp_path / "index").exists()
    build(tmp_path, range(5))
    with pytest.raises(ValueError, match=r"is not built for 1 of 1 partitions: run `densebridge build` first"):
        main([recipe_file(tmp_path, seed=6)])
    with pytest.raises(ValueError, match="index_gb must be above 0"):
        IndexOptions(index_gb=0)
