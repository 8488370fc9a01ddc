"""`densebridge search`: queries embedded as the dataset was, stale indices said, and what serving refuses.

clip-retrieval itself is in test_clip_retrieval.py; here exact search stands in for it.
"""

from __future__ import annotations

import base64
import errno
import json
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from examples.shapes.recipe import JUDGE
from jobs.clip_retrieval.back import answer, check_takedowns, serve
from jobs.clip_retrieval.built import Built, read_built
from jobs.clip_retrieval.query import QueryEncoder
from jobs.index import IndexOptions, make_index
from jobs.recipe import Recipe
from jobs.search import find_index, main
from pipeline.sample import sample_key
from pipeline.tombstones import write_tombstones
from stages.embed import EmbedConfig
from stages.score import Score, ScoreConfig
from tests.searchable import build, photo, recipe_file, recipe_in, url_of, without_environment

ROWS = 30


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    without_environment(monkeypatch)


@pytest.fixture(scope="module")
def built_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    with pytest.MonkeyPatch.context() as patch:
        without_environment(patch)
        make_index(build(folder, range(ROWS)), folder / "index/photos", IndexOptions())
    return folder


@pytest.fixture
def folder(built_once: Path, tmp_path: Path) -> Path:
    """A copy of the built dataset and its index, which a test may change."""
    return Path(shutil.copytree(built_once, tmp_path / "photos"))


def found(capsys: pytest.CaptureFixture[str], recipe: str, *flags: str) -> tuple[list[dict], list[str], str]:
    capsys.readouterr()
    assert main([recipe, *flags, "--json"]) == 0
    told = capsys.readouterr()
    answered = json.loads(told.out)
    return answered["hits"], answered["stale"], told.err


def test_texts_and_pictures_are_found(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, caption = recipe_file(folder), photo(3)[1]
    hits, stale, said = found(capsys, recipe, caption, "--by", "caption", "--count", "4")
    assert len(hits) == 4 and hits[0]["key"] == sample_key(url_of(3)) and hits[0]["score"] > 0.99
    assert hits[0]["caption"] == caption and hits[0]["url"] == url_of(3) and stale == []
    (folder / "query.jpg").write_bytes(photo(12)[0])
    hits, _, _ = found(capsys, recipe, "--image", str(folder / "query.jpg"))
    assert len(hits) == 10 and hits[0]["key"] == sample_key(url_of(12)) and hits[0]["score"] > 0.99
    hits, _, said = found(capsys, recipe, "a red cross " * 60)
    assert len(hits) == 10 and "longer than the recipe's CLIP reads" in said
    assert main([recipe, caption, "--count", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_queries_are_embedded_as_the_stages_do(folder: Path) -> None:
    recipe = recipe_in(folder)
    encoder, score = QueryEncoder(recipe), Score(recipe.stages[2].config)
    score.load()
    texts = [photo(n)[1] for n in range(3)]
    image = [encoder.picture(photo(n)[0]) for n in range(3)]
    batch = pa.table({"image_embedding": [vector.tolist() for vector in image], "caption": texts, "text": texts})
    stored = np.array(score.process(batch)["caption_embedding"])
    assert np.array_equal(np.array([encoder.text(text) for text in texts]).astype(np.float16), stored)
    assert np.linalg.norm(image, axis=1) == pytest.approx(1.0, abs=2e-3)
    with pytest.raises(ValueError, match="this is no picture that can be read"):
        encoder.picture(b"no picture")
    with pytest.raises(ValueError, match="the text is empty"):
        encoder.text("  ")
    with pytest.raises(ValueError, match="no stage that writes 'caption_embedding' with a CLIP"):
        QueryEncoder(replace(recipe, stages=recipe.stages[:2]))


def test_a_stale_index_is_said_and_still_answers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, query = recipe_file(folder), photo(3)[1]
    build(folder, range(ROWS + 5))
    hits, stale, said = found(capsys, recipe, query)
    assert stale == ["the dataset has changed since"] and hits
    assert "is stale (the dataset has changed since): run `densebridge index` for a new one" in said
    _, stale, _ = found(capsys, recipe_file(folder, seed=6), query)
    assert stale == ["the dataset is not wholly built: run `densebridge build`"]


def test_a_sample_that_was_taken_down_is_not_shown_from_a_stale_index(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, query = recipe_file(folder), photo(3)[1]
    (key, *_) = [hit["key"] for hit in found(capsys, recipe, query, "--by", "caption")[0]]
    assert key == sample_key(url_of(3))
    write_tombstones(recipe_in(folder).folder, keys=[key])
    hits, _, _ = found(capsys, recipe, query, "--by", "caption", "--count", str(ROWS))
    assert key not in {hit["key"] for hit in hits} and len(hits) == ROWS - 1


def test_another_clip_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = Path(shutil.copytree(JUDGE, folder / "clip"))
    (other / "notes.txt").write_text("another")  # any file of a model makes it another
    recipe = recipe_in(folder)
    stages = (
        recipe.stages[0],
        type(recipe.stages[1])(EmbedConfig(model=str(other))),
        Score(ScoreConfig(model=str(other))),
    )
    with pytest.raises(ValueError, match="made with another CLIP than the recipe's: run `densebridge build`"):
        find_index(replace(recipe, stages=stages), folder / "index/photos")


def test_what_cannot_be_asked_is_said_in_one_line(folder: Path, tmp_path: Path) -> None:
    recipe = recipe_file(folder)
    for flags in ([], ["  "], ["red", "--image", "x.png"], ["red", "--serve"]):
        with pytest.raises(ValueError, match="give one of: a text to look for"):
            main([recipe, *flags])
    with pytest.raises(FileNotFoundError, match=r"there is no index in .*/elsewhere: run `densebridge index` first"):
        main([recipe, "red", "--folder", str(tmp_path / "elsewhere")])
    with pytest.raises(FileNotFoundError, match=r"--image .*x.png: there is no such file"):
        main([recipe, "--image", str(tmp_path / "x.png")])
    (tmp_path / "x.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"--image .*x.png: this is no picture"):
        main([recipe, "--image", str(tmp_path / "x.png")])
    with pytest.raises(ValueError, match="count must be at least 1"):
        main([recipe, "red", "--count", "0"])
    (folder / "index/photos/index.json").write_text('{"version": 1}')
    with pytest.raises(FileNotFoundError, match="run `densebridge index` first"):
        main([recipe, "red"])


def index_of(folder: Path) -> tuple[Recipe, Path, Built]:
    built = read_built(folder / "index/photos")
    assert built
    return recipe_in(folder), folder / "index/photos", built


def test_a_taken_port_is_said_before_anything_is_loaded(folder: Path) -> None:
    recipe, index, built = index_of(folder)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(OSError) as told:
            serve(recipe, index, built, other.getsockname()[1], print)
    assert told.value.errno == errno.EADDRINUSE


def test_an_index_with_what_was_taken_down_is_not_served(folder: Path) -> None:
    recipe, index, built = index_of(folder)
    write_tombstones(recipe.folder, keys=[sample_key("u://of/another")])
    heeded = check_takedowns(recipe, index, built, [])
    assert len(heeded) == 1
    write_tombstones(recipe.folder, domains=["pictures1.example"])
    with pytest.raises(
        ValueError, match=r"holds 10 samples that were taken down, so it is not served: run `densebridge"
    ):
        check_takedowns(recipe, index, built, heeded)
    with pytest.raises(ValueError, match="so it is not served"):
        serve(recipe, index, built, 0, print)


def test_what_the_server_asks_is_answered(folder: Path) -> None:
    encoder = QueryEncoder(recipe_in(folder))
    image = base64.b64encode(photo(1)[0]).decode()
    assert answer(encoder, {"image": image})["vector"] == pytest.approx(encoder.picture(photo(1)[0]))
    assert answer(encoder, {"text": "a red cross"})["vector"] == pytest.approx(encoder.text("a red cross"))
    assert answer(encoder, {"text": "half a pair \ud800"})["vector"]
    assert answer(encoder, {"image": "%%%"}) == {"wrong": "the image is not in base64"}
    assert "no picture" in answer(encoder, {"image": "AAAA"})["wrong"]
