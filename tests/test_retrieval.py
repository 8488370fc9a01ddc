"""A query to a clip-retrieval server becomes a source table: what is asked, what is taken of the answers, and what a server that
is none, or a hostile one, is told. (The real server is in test_clip_retrieval.py.)
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from aiohttp import web

from jobs.retrieve import main
from stages.retrieval import Query, RetrievalConfig, read_query, retrieve
from stages.source import Source, read_source
from tests.web_server import serve_app

ROWS = [
    {"url": "https://a.example/1", "caption": "one", "similarity": 0.5, "id": 1},
    {"url": " https://a.example/2 ", "caption": None, "similarity": 0.75, "id": 2, "image": "ignored"},
    {"url": "file:///etc/hostname", "caption": "local", "similarity": 0.9, "id": 3},
    {"id": 4, "similarity": 0.4},
    {"url": "https://a.example/3", "caption": "half a pair \ud800", "similarity": 0.25, "id": 5},
]


class Back:
    """A server that answers what it is told to."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.indices: Any = ["first", "second"]
        self.answer: Any = ROWS
        self.status = 200
        self.delay = 0.0

    async def list_indices(self, request: web.Request) -> web.Response:
        return web.json_response(self.indices)

    async def search(self, request: web.Request) -> web.Response:
        self.asked.append(await request.json())
        await asyncio.sleep(self.delay)
        body = self.answer if isinstance(self.answer, bytes) else json.dumps(self.answer).encode()
        return web.Response(body=body, status=self.status, headers={"Location": "/indices-list"})


@pytest.fixture
def back() -> Back:
    return Back()


@pytest.fixture
def url(back: Back) -> Iterator[str]:
    app = web.Application(client_max_size=1 << 24)
    app.add_routes([web.get("/indices-list", back.list_indices), web.post("/knn-service", back.search)])
    with serve_app(app) as port:
        yield f"http://127.0.0.1:{port}"


def test_the_best_first_urls_once_and_only_those_of_the_web(back: Back, url: str) -> None:
    found = retrieve(RetrievalConfig(back=url), [Query(name="red"), Query(name="blue")])
    assert found.table.to_pylist() == [
        {"url": "https://a.example/2", "text": "", "similarity": 0.75, "query": "red"},
        {"url": "https://a.example/1", "text": "one", "similarity": 0.5, "query": "red"},
        {"url": "https://a.example/3", "text": "half a pair ?", "similarity": 0.25, "query": "red"},
    ]
    assert found.skipped == 4
    near = retrieve(RetrievalConfig(back=url, min_similarity=0.6), [Query(name="red")])
    assert near.table.column("url").to_pylist() == ["https://a.example/2"]


def test_all_that_the_server_wants_is_sent(back: Back, url: str) -> None:
    config = RetrievalConfig(back=f"{url}/", index="second", by="caption", count=7)
    retrieve(config, [Query(name="red"), Query(name="x.png", picture=b"\x89PNG")])
    text, picture = back.asked
    needed = {"modality", "num_images", "num_result_ids", "indice_name", "deduplicate", "use_safety_model"}
    needed |= {"use_violence_detector", "aesthetic_score", "aesthetic_weight", "use_mclip"}
    assert needed <= text.keys() and text["text"] == "red" and text["image"] is None
    assert (text["modality"], text["indice_name"], text["num_images"], text["num_result_ids"]) == (
        "text",
        "second",
        7,
        7,
    )
    assert picture["text"] is None and base64.b64decode(picture["image"]) == b"\x89PNG"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"<html>", "answers something else than JSON"),
        (b"[" * 100_000, "answers something else than JSON"),
        ({"message": "no"}, "answers no list"),
        ([1], "answers rows without a similarity"),
        ([{"url": "https://a.example", "similarity": "0.5"}], "answers rows without a similarity"),
        (b'[{"url": "https://a.example", "similarity": NaN}]', "answers rows without a similarity"),
        (b" " * 2_000_000, "sends more than 1 MB: lower count, or raise max_mb"),
    ],
)
def test_what_is_no_answer_is_said(back: Back, url: str, answer: Any, said: str) -> None:
    back.answer = answer
    with pytest.raises(ValueError, match=said):
        retrieve(RetrievalConfig(back=url, max_mb=1), [Query(name="red")])


@pytest.mark.parametrize("status", [302, 400, 500])
def test_a_refusal_and_a_redirect_are_said(back: Back, url: str, status: int) -> None:
    back.status, back.answer = status, {"message": "no\nsuch thing"}
    with pytest.raises(
        ValueError, match=rf"knn-service answers {status} \(.*no.*such thing.*\): is it a clip-retrieval"
    ):
        retrieve(RetrievalConfig(back=url), [Query(name="red")])


def test_a_server_that_is_not_there_or_hangs(back: Back, url: str) -> None:
    with pytest.raises(ValueError, match=r"has no index 'third': it has first, second"):
        retrieve(RetrievalConfig(back=url, index="third"), [Query(name="red")])
    back.delay = 30
    with pytest.raises(TimeoutError, match=r"knn-service does not answer within 0\.2 s"):
        retrieve(RetrievalConfig(back=url, timeout=0.2), [Query(name="red")])
    back.indices = []
    with pytest.raises(ValueError, match="names no index: is it a clip-retrieval server"):
        retrieve(RetrievalConfig(back=url), [Query(name="red")])
    with pytest.raises(
        OSError, match=r"127\.0\.0\.1:9/indices-list does not answer .*: start it, or correct its address"
    ):
        retrieve(RetrievalConfig(back="http://127.0.0.1:9"), [Query(name="red")])


def test_settings_and_pictures_are_checked(tmp_path: Path) -> None:
    for wrong in ("127.0.0.1:1234", "ftp://x", "http://user@host", "http://host?x=1", ""):
        with pytest.raises(ValueError, match="back looks like http://127"):
            RetrievalConfig(back=wrong)
    with pytest.raises(ValueError, match="count must be at least 1"):
        RetrievalConfig(count=0)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        read_query(tmp_path / "x.png", RetrievalConfig())
    (tmp_path / "x.png").write_bytes(b" " * 2000)
    with pytest.raises(ValueError, match=r"has more than 0\.001 MB"):
        read_query(tmp_path / "x.png", RetrievalConfig(max_mb=0.001))


def test_the_job_writes_a_table_that_is_a_source(
    back: Back, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "pairs.parquet"
    assert main([str(path), "--back", url, "--text", "red", "blue", "--count", "5"]) == 0
    assert f"{path}: 3 URLs; 4 without a URL were left out" in capsys.readouterr().out
    assert pq.read_table(path).column_names == ["url", "text", "similarity", "query"]
    (batch, *_) = [batch for batch in read_source(Source(path=str(path))) if batch.num_rows]
    assert batch.column("url").to_pylist()[0] == "https://a.example/2" and len(back.asked) == 2
    with pytest.raises(ValueError, match="is there already: name another, or delete it"):
        main([str(path), "--back", url, "--text", "red"])


def test_the_job_says_what_is_missing(back: Back, url: str, tmp_path: Path) -> None:
    table = str(tmp_path / "pairs.parquet")
    for flags in ([], ["--text", " "]):
        with pytest.raises(ValueError, match="say what to look for"):
            main([table, "--back", url, *flags])
    with pytest.raises(ValueError, match=r"needs the table first, a .parquet file: got '--text'"):
        main(["--text", "red"])
    back.answer = [{"id": 4, "similarity": 0.4}]
    with pytest.raises(ValueError, match="found nothing with a URL: no table is written"):
        main([table, "--back", url, "--text", "red"])
    assert list(tmp_path.iterdir()) == []
