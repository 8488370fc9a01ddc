"""The real clip-retrieval, in its own environment, end to end: index, search, a takedown, back over HTTP, a source from it.

Nothing stands in for anything here, and nothing is skipped: `make test` makes the environment beforehand, and where it is not
there the first test makes it, for which it takes a package index.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import numpy as np
import pytest

from jobs import forget, index, retrieve, search
from jobs.clip_retrieval.built import read_built
from jobs.clip_retrieval.environment import environment
from jobs.clip_retrieval.query import QueryEncoder
from pipeline.sample import sample_key
from stages.retrieval import Query, RetrievalConfig
from stages.retrieval import retrieve as ask
from stages.source import Source, read_source
from tests.searchable import build, photo, recipe_file, recipe_in, url_of

pytestmark = pytest.mark.timeout(900)  # making the environment included
ROOT = Path(__file__).parents[1]
ROWS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A built dataset with a real index."""
    environment()
    folder = tmp_path_factory.mktemp("photos")
    build(folder, range(ROWS))
    assert index.main([recipe_file(folder)]) == 0
    return folder


def hits(capsys: pytest.CaptureFixture[str], recipe: str, *flags: str) -> list[dict]:
    capsys.readouterr()
    assert search.main([recipe, *flags, "--json"]) == 0
    return json.loads(capsys.readouterr().out)["hits"]


@contextmanager
def serving(recipe: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """The address of the back server, as a process of its own."""
    command = [sys.executable, "-m", "jobs.cli", "search", recipe, "--serve", "--port", "0"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    ) as process:
        assert process.stdout and process.stderr
        line = process.stdout.readline()
        try:
            assert "serves index 'photos' at http://127.0.0.1:" in line, process.stderr.read()
            yield line.split(" at ")[1].split(" ")[0], process
        finally:
            process.send_signal(signal.SIGTERM)  # a shell may have had this process ignore Ctrl-C


def post(url: str, body: dict, **headers: str) -> tuple[int, dict[str, str], bytes]:
    import asyncio

    async def send() -> tuple[int, dict[str, str], bytes]:
        async with aiohttp.ClientSession() as session, session.post(url, json=body, headers=headers) as response:
            return response.status, dict(response.headers), await response.read()

    return asyncio.run(send())


def test_1_the_index_is_whole_and_answers_as_exact_search_does(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    built = read_built(folder / "index/photos")
    assert built and built.rows == ROWS and list(built.files.values()) == [20, 20, 20]
    assert all(found == {"found": 1.0, "recall": 1.0} for found in built.checked.values())
    recipe, encoder = recipe_file(folder), QueryEncoder(recipe_in(folder))
    version = folder / "index/photos" / built.version
    for kind, flag in (("img_emb", "picture"), ("text_emb", "caption")):
        vectors = np.concatenate([np.load(path) for path in sorted((version / kind).iterdir())]).astype(np.float32)
        cosines = np.sort(vectors @ encoder.text("a large red cross"))[::-1][:5]
        found = hits(capsys, recipe, "a large red cross", "--by", flag, "--count", "5")
        assert [hit["score"] for hit in found] == pytest.approx(cosines.tolist(), abs=1e-3)
    (folder / "query.jpg").write_bytes(photo(41)[0])
    assert hits(capsys, recipe, "--image", str(folder / "query.jpg"))[0]["key"] == sample_key(url_of(41))
    assert index.main([recipe]) == 0 and "up to date" in capsys.readouterr().out


def test_2_back_serves_this_machine_alone_and_its_answers_are_a_source(folder: Path) -> None:
    caption, table = photo(17)[1], folder / "pairs.parquet"
    with serving(recipe_file(folder)) as (url, process):
        (folder / "query.jpg").write_bytes(photo(41)[0])
        flags = ["--text", caption, "--image", str(folder / "query.jpg"), "--by", "picture", "--count", "20"]
        assert retrieve.main([str(table), "--back", url, *flags]) == 0
        config = RetrievalConfig(back=url, by="caption", count=3)
        found = ask(config, [Query(name=caption)]).table.to_pylist()
        assert found[0]["url"] == url_of(17) and found[0]["text"] == caption and found[0]["similarity"] > 0.99
        body = {"modality": "image", "num_images": 2, "num_result_ids": 2, "indice_name": "photos"}
        status, headers, answered = post(
            f"{url}/knn-service", {**body, "text": "a red cross"}, Origin="http://evil.test"
        )
        assert status == 200 and len(json.loads(answered)) == 2
        assert set(json.loads(answered)[0]) == {"key", "url", "caption", "id", "similarity"}
        assert not [name for name in headers if name.lower().startswith("access-control")]
        refused = post(f"{url}/knn-service", {**body, "image_url": "http://127.0.0.1:9/x.png"})
        assert refused[0] == 400 and b"is not answered here" in refused[2]
        assert post(f"{url}/knn-service", {**body, "text": "a"}, Host="evil.test")[0] == 403
        assert post(f"{url}/knn-service", {**body, "embedding_input": [1.0, 2.0]})[0] == 400
        port = int(url.rsplit(":", 1)[1])
        listening = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
        bound = {line.split()[1] for line in listening.splitlines() if f":{port:04X} " in line and " 0A " in line}
        assert bound == {f"0100007F:{port:04X}"}  # 127.0.0.1
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0, process.stderr and process.stderr.read()
    rows = [row for batch in read_source(Source(path=str(table))) for row in batch.to_pylist()]
    assert {url_of(41)} <= {row["url"] for row in rows} and 20 <= len(rows) <= 40
    assert next(row for row in rows if row["url"] == url_of(41))["similarity"] > 0.99


def test_3_a_takedown_leaves_the_answers_at_once_and_the_index_with_the_next(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, caption, gone = recipe_file(folder), photo(17)[1], sample_key(url_of(17))
    assert hits(capsys, recipe, caption, "--by", "caption")[0]["key"] == gone
    (folder / "urls.txt").write_text(url_of(17))
    with serving(recipe) as (_, process):
        assert forget.main([recipe, "--urls", str(folder / "urls.txt")]) == 0
        assert process.wait(timeout=60) == 1
        assert process.stderr and "holds 1 samples that were taken down, so it is not served" in process.stderr.read()
    assert gone not in {hit["key"] for hit in hits(capsys, recipe, caption, "--by", "caption", "--count", str(ROWS))}
    assert search.main([recipe, caption]) == 0 and "is stale" in capsys.readouterr().err
    build(folder, range(ROWS + 3))
    assert index.main([recipe]) == 0 and f"{ROWS + 2} samples, made in" in capsys.readouterr().out
    assert search.main([recipe, caption]) == 0 and "is stale" not in capsys.readouterr().err
