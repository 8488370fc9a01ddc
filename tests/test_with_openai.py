"""Captions from servers: a real one with the shapes world's captioner, and a real one that stumbles in every way."""

from __future__ import annotations

import asyncio
import base64
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web

from examples.shapes.making.measure import held_out
from examples.shapes.making.pictures import photo_jpeg
from examples.shapes.recipe import WEIGHTS
from examples.shapes.words import PROMPTS
from stages.captioning.engine import Answer, not_an_image
from stages.captioning.with_openai import OpenAIConfig, ServersFail, read_answer
from stages.captioning.with_transformers import TransformersConfig

CAPTIONER = str(WEIGHTS / "captioner")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def photos() -> list[bytes]:
    scenes, rng = held_out(4, (1, 0, 0, 0))
    return [photo_jpeg(scenes, n, rng) for n in range(4)]


# -- transformers serve --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of `transformers serve` with the shapes world's captioner."""
    pytest.importorskip("uvicorn", reason="transformers serve needs the extra [dev]")
    port, log = free_port(), tmp_path_factory.mktemp("serve") / "log"
    program = Path(sys.executable).with_name("transformers")
    command = [str(program), "serve", CAPTIONER, "--port", str(port), "--dtype", "float32", "--device", "cpu"]
    with log.open("w") as out:
        server = subprocess.Popen(
            command, stdout=out, stderr=out, env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        )
    try:
        for _ in range(1200):
            if server.poll() is not None:
                pytest.fail(log.read_text()[-2000:])
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.kill()
        server.wait()


def test_a_server_says_what_the_model_says_here(served: str, photos: list[bytes]) -> None:
    local = TransformersConfig(model=CAPTIONER, dtype="float32", max_new_tokens=110, batch_size=1).load()
    config = OpenAIConfig(model=CAPTIONER, endpoints=(served,), max_new_tokens=110, timeout=60, concurrency=2)
    asked = ([*photos[:2], b"broken"], [*PROMPTS[:2], "?"], [0] * 3)
    found = config.load().captions(*asked)
    assert found == local.captions(*asked)
    assert [a.finish for a in found] == ["stop", "stop", None] and found[2] == not_an_image()


# -- a server that stumbles ------------------------------------------------------------------------------------------------


class Stumbling:
    """A server in a thread. `plan` holds what it does with the next requests: a status, or a word; then it answers."""

    def __init__(self) -> None:
        self.plan: list[int | str] = []
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.retry_after = "0"
        self.most, self._now, self.pause = 0, 0, 0.0
        self._port, self._loop = free_port(), asyncio.new_event_loop()
        self._up = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        self._up.wait(10)
        self.url = f"http://127.0.0.1:{self._port}/v1"

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        app = web.Application(client_max_size=1 << 26)
        app.router.add_post("/v1/chat/completions", self._answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        self._loop.run_until_complete(runner.setup())
        self._loop.run_until_complete(web.TCPSite(runner, "127.0.0.1", self._port).start())
        self._up.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(await request.json())
        self.headers.append(dict(request.headers))
        self._now += 1
        self.most = max(self.most, self._now)
        await asyncio.sleep(self.pause)
        self._now -= 1
        step = self.plan.pop(0) if self.plan else 200
        if step == "hang":
            await asyncio.sleep(30)
        if step == "close":
            assert request.transport
            request.transport.close()
        if step == "nonsense":
            return web.json_response({"object": "error"})
        if step == "list":
            return web.json_response({"choices": [{"message": {"content": [1]}, "finish_reason": "stop"}]})
        if step == "html":
            return web.Response(text="<html>", content_type="text/html")
        if isinstance(step, int) and step != 200:
            return web.json_response({"error": "told to"}, status=step, headers={"Retry-After": self.retry_after})
        finish = step if isinstance(step, str) else "stop"
        choice = {"message": {"content": "A dog sits."}, "finish_reason": finish}
        return web.json_response({"choices": [choice], "usage": {"completion_tokens": 4}})

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)


@pytest.fixture
def server() -> Iterator[Stumbling]:
    made = Stumbling()
    yield made
    made.close()


SAID = Answer(text="A dog sits.", finish="stop", tokens=4)


def config(*servers: Stumbling | str, **fields: Any) -> OpenAIConfig:
    urls = tuple(s if isinstance(s, str) else s.url for s in servers)
    return OpenAIConfig(**{"model": "m", "endpoints": urls, "backoff": 0.0, "timeout": 20.0, **fields})


def test_what_is_sent(server: Stumbling, photos: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPTION_KEY", "secret-word")
    made = config(server, max_new_tokens=9, api_key_env="CAPTION_KEY")
    assert made.load().captions(photos[:1], ["What?"], [7]) == [SAID]
    (body,) = server.bodies
    (message,) = body.pop("messages")
    assert body == {"model": "m", "max_tokens": 9, "temperature": 0.0}
    url = message["content"][0]["image_url"]["url"]
    assert base64.b64decode(url.removeprefix("data:image/jpeg;base64,")) == photos[0]
    assert message["content"][1] == {"type": "text", "text": "What?"}
    assert server.headers[0]["Authorization"] == "Bearer secret-word" and "secret-word" not in repr(made)
    config(server, temperature=0.5).load().captions(photos[:1], ["What?"], [7])
    assert server.bodies[1]["seed"] == 7


@pytest.mark.parametrize("stumble", [429, 500, 503, "close", "nonsense", "list", "html"])
def test_a_stumble_is_got_over(server: Stumbling, photos: list[bytes], stumble: int | str) -> None:
    server.plan = [stumble, stumble]
    assert config(server).load().captions(photos[:1], ["?"], [0]) == [SAID]
    assert len(server.bodies) == 3


def test_after_the_last_try_the_row_fails_and_may_be_tried_again(server: Stumbling, photos: list[bytes]) -> None:
    server.plan = [500] * 3
    (failed,) = config(server, retries=2).load().captions(photos[:1], ["?"], [0])
    assert failed == Answer(status="failed", reason="caption_server_error", transient=True)
    server.plan = ["hang"]
    (failed,) = config(server, retries=0, timeout=0.3).load().captions(photos[:1], ["?"], [0])
    assert failed == Answer(status="failed", reason="caption_timeout", transient=True)


def test_what_a_server_says_of_one_picture_ends_that_row_alone(server: Stumbling, photos: list[bytes]) -> None:
    server.plan = [400, "content_filter", "length", 200]
    found = config(server, concurrency=1).load().captions(photos, ["?"] * 4, [0] * 4)
    assert found == [
        Answer(status="failed", reason="caption_request_refused"),
        Answer(status="dropped", reason="caption_refused"),
        replace(SAID, finish="length"),
        SAID,
    ]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_is_wrong_for_every_row_stops_the_build(server: Stumbling, photos: list[bytes], status: int) -> None:
    server.plan = [status] * 8
    with pytest.raises(ValueError, match=rf"{server.url} answers {status} .*look at model, endpoints and api_key_env"):
        config(server).load().captions(photos, ["?"] * 4, [0] * 4)


def test_when_all_servers_fail_the_build_stops(photos: list[bytes]) -> None:
    nobody = tuple(f"http://127.0.0.1:{free_port()}/v1" for _ in range(2))
    engine = config(*nobody, patience=6).load()
    assert [a.reason for a in engine.captions(photos, ["?"] * 4, [0] * 4)] == ["caption_server_error"] * 4
    with pytest.raises(ServersFail, match=rf"no caption server answers \({nobody[0]}: .*{nobody[1]}: ") as told:
        engine.captions(photos, ["?"] * 4, [0] * 4)
    assert "\n" not in str(told.value)


def test_failures_are_counted_in_a_row(server: Stumbling, photos: list[bytes]) -> None:
    server.plan = [500, 500, 200, 500, 500, 200]
    found = config(server, retries=0, patience=3, concurrency=1).load().captions(photos[:1] * 6, ["?"] * 6, [0] * 6)
    assert [a.status for a in found] == ["failed", "failed", "kept"] * 2


def test_where_all_of_the_first_pictures_are_refused_a_setting_is_wrong(server: Stumbling, photos: list[bytes]) -> None:
    server.plan = [400] * 4
    engine = config(server, patience=4, concurrency=1).load()
    assert engine.captions(photos[:3], ["?"] * 3, [0] * 3)[2].reason == "caption_request_refused"
    with pytest.raises(
        ValueError, match=rf"{server.url} refused all of the first 4 pictures with 400 .*told to.*max_new"
    ):
        engine.captions(photos[:1], ["?"], [0])
    server.plan = [200, *[400] * 8]
    found = config(server, patience=4, concurrency=1).load().captions(photos * 2, ["?"] * 8, [0] * 8)
    assert [a.status for a in found] == ["kept", *["failed"] * 7]


def test_a_server_with_too_much_to_do_is_told_apart_from_one_that_is_gone(
    server: Stumbling, photos: list[bytes]
) -> None:
    server.plan = [429] * 2
    with pytest.raises(ServersFail, match=r"refuses for load \(HTTP 429\)\): lower concurrency and"):
        config(server, retries=0, patience=2, concurrency=1).load().captions(photos[:2], ["?"] * 2, [0] * 2)


@pytest.mark.parametrize(
    ("said", "least", "most"),
    [("0.5", 0.5, 0.75), ("3", 3, 4.5), ("900", 60, 90), ("nan", 0, 0), ("-1", 0, 0), ("Wed, 21 Oct 2015", 0, 0)],
)
def test_waits_are_what_the_server_says_and_a_little_more(
    server: Stumbling, photos: list[bytes], monkeypatch: pytest.MonkeyPatch, said: str, least: float, most: float
) -> None:
    server.plan, server.retry_after, slept = [503], said, []
    sleep = asyncio.sleep

    async def noted(seconds: float) -> None:
        slept.append(seconds)
        await sleep(0)

    made = config(server).load()
    monkeypatch.setattr("stages.captioning.with_openai.asyncio", SimpleNamespace(**{**vars(asyncio), "sleep": noted}))
    assert made.captions(photos[:1], ["?"], [0]) == [SAID]
    assert len(slept) == 1 and least <= slept[0] <= most


def test_strange_answers_become_rows_that_can_be_stored() -> None:
    def body(content: str, tokens: str) -> bytes:
        said = '{"choices": [{"message": {"content": %s}}], "usage": {"completion_tokens": %s}}'
        return (said % (content, tokens)).encode()

    assert read_answer(body('"A \\ud800dog"', "4")) == Answer(text="A ?dog", finish="stop", tokens=4)
    for tokens in ("4294967296", "-1", "null"):
        assert read_answer(body('"A dog"', tokens)) == Answer(text="A dog", finish="stop", tokens=None)
    with pytest.raises(Exception, match="no chat completion"):
        read_answer(b"[" * 200_000)


def test_one_server_that_is_gone_costs_no_row(server: Stumbling, photos: list[bytes]) -> None:
    gone = f"http://127.0.0.1:{free_port()}/v1"
    found = config(gone, server, patience=3).load().captions(photos * 10, ["?"] * 40, [0] * 40)
    assert found == [SAID] * 40


def test_requests_go_to_the_least_busy_server_and_no_more_than_allowed(server: Stumbling, photos: list[bytes]) -> None:
    second = Stumbling()
    try:
        server.pause = second.pause = 0.02
        assert config(server, second, concurrency=3).load().captions(photos * 8, ["?"] * 32, [0] * 32) == [SAID] * 32
        assert len(server.bodies) + len(second.bodies) == 32 and min(len(server.bodies), len(second.bodies)) > 8
        assert server.most <= 3 and second.most <= 3 and server.most + second.most > 3
    finally:
        second.close()


def test_settings_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ({"endpoints": ()}, {"endpoints": ("gpu7:8000",)}, {"endpoints": ("http://u:p@h/v1",)},
                  {"concurrency": 0}, {"timeout": 0.0}, {"retries": -1}):  # fmt: skip
        with pytest.raises(ValueError, match="recaption: "):
            config("http://h/v1", **wrong) if "endpoints" not in wrong else OpenAIConfig(model="m", **wrong)
    monkeypatch.delenv("CAPTION_KEY", raising=False)
    with pytest.raises(ValueError, match="api_key_env names CAPTION_KEY, which is not set here"):
        config("http://h/v1", api_key_env="CAPTION_KEY").load()
