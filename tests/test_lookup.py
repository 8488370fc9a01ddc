"""Vector → samples: positions count over all metadata files, and what was taken down is never among them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from jobs.clip_retrieval import lookup
from jobs.clip_retrieval.built import Built, read_built
from jobs.clip_retrieval.lookup import look_up
from jobs.index import IndexOptions, make_index
from jobs.recipe import Recipe
from pipeline.sample import sample_key
from pipeline.tombstones import Tombstones
from tests.searchable import ExactInside, build, photo, url_of, without_environment

ROWS = 50  # in partitions of 20


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    folder = tmp_path_factory.mktemp("photos")
    with pytest.MonkeyPatch.context() as patch:
        without_environment(patch)
        recipe = build(folder, range(ROWS))
        make_index(recipe, folder / "i", IndexOptions())
    return recipe, folder / "i"


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    without_environment(monkeypatch)


def row(folder: Path, built: Built, number: int, kind: str = "img_emb") -> np.ndarray:
    """The vector of a picture, where the metadata say that it lies."""
    vectors = np.concatenate([np.load(path) for path in sorted((folder / built.version / kind).iterdir())])
    return vectors[number].astype(np.float32)


@pytest.mark.parametrize(("kind", "vectors"), [("picture", "img_emb"), ("caption", "text_emb")])
def test_every_sample_is_found_by_its_own_vector(made: tuple[Recipe, Path], kind: str, vectors: str) -> None:
    _, folder = made
    built = read_built(folder)
    assert built and len(built.files) == 3
    for number in (0, 19, 20, 39, 40, 49):
        first, *_ = look_up(
            folder, built, row(folder, built, number, vectors), kind=kind, count=3, tombstones=Tombstones()
        )
        assert first.key == sample_key(url_of(number)) and first.url == url_of(number)
        assert first.caption == photo(number)[1] and first.score == pytest.approx(1.0, abs=2e-3)


def test_the_best_come_first_and_as_many_as_there_are(made: tuple[Recipe, Path]) -> None:
    _, folder = made
    built = read_built(folder)
    assert built
    hits = look_up(folder, built, row(folder, built, 7), kind="picture", count=1000, tombstones=Tombstones())
    assert len(hits) == len({hit.key for hit in hits}) == ROWS
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_what_was_taken_down_is_never_shown(made: tuple[Recipe, Path]) -> None:
    """By key, by domain (a third of all) and by the digest of its bytes; as many others are shown instead."""
    import hashlib

    _, folder = made
    built = read_built(folder)
    assert built
    vector = row(folder, built, 7)
    everything = look_up(folder, built, vector, kind="picture", count=ROWS, tombstones=Tombstones())
    numbers = [int(hit.url.rsplit("/", 1)[1]) for hit in everything]
    by_key, by_digest = [n for n in numbers if n % 3][:2]
    tombstones = Tombstones(
        keys=frozenset({sample_key(url_of(by_key))}),
        domains=frozenset({"pictures0.example"}),
        sha256=frozenset({hashlib.sha256(photo(by_digest)[0]).hexdigest()}),
    )
    left = [n for n in numbers if n % 3 and n not in (by_key, by_digest)]
    for count in (1, 5, ROWS):
        hits = look_up(folder, built, vector, kind="picture", count=count, tombstones=tombstones)
        assert [hit.url for hit in hits] == [url_of(n) for n in left[:count]]
    nothing = Tombstones(keys=frozenset(sample_key(url_of(n)) for n in range(ROWS)))
    assert look_up(folder, built, vector, kind="picture", count=5, tombstones=nothing) == []


def test_an_approximate_index_may_find_fewer(made: tuple[Recipe, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    class Few(ExactInside):
        def ask(self, *, vectors: list[list[float]], count: int) -> dict:
            return {"positions": [[21, -1, 3][:count]], "scores": [[0.5, -3e38, 0.25][:count]]}

    _, folder = made
    built = read_built(folder)
    assert built
    monkeypatch.setattr(lookup, "Inside", Few)
    vector = row(folder, built, 0)
    hits = look_up(folder, built, vector, kind="picture", count=3, tombstones=Tombstones())
    assert [(hit.url, hit.score) for hit in hits] == [(url_of(21), 0.5), (url_of(3), 0.25)]


def test_what_does_not_fit_is_said(made: tuple[Recipe, Path], tmp_path: Path) -> None:
    _, folder = made
    built = read_built(folder)
    assert built
    with pytest.raises(ValueError, match="the query has 3 numbers and the index 128"):
        look_up(folder, built, np.ones(3, np.float32), kind="picture", count=3, tombstones=Tombstones())
    shutil.copy(folder / "index.json", tmp_path / "index.json")
    with pytest.raises(FileNotFoundError, match="a newer index has taken its place"):
        look_up(tmp_path, built, np.ones(128, np.float32), kind="picture", count=3, tombstones=Tombstones())
