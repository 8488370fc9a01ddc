"""Actors of one node that load the same model at once: its files come over the network once."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODEL, WEIGHTS = "shapes/clip", "model.safetensors"
ACTOR = f"""
import sys
import transformers
from pipeline.clip_models import TextEncoder
print("ready", flush=True)
sys.stdin.readline()
print(TextEncoder({MODEL!r}, None, device="cpu").embed(["a red circle"])[0].tobytes().hex())
"""


class Hub(ThreadingHTTPServer):
    """Answers for one model as the hub does. The weights are only sent once both actors have asked about them."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder = folder
        self.fetched: Counter[str] = Counter()
        self.lock, self.both = threading.Lock(), threading.Barrier(2)


class Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        name = self.path.partition("/resolve/main/")[2]
        path = self.server.folder / name
        if not name or not path.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = path.read_bytes()
        if body:
            with self.server.lock:
                self.server.fetched[name] += 1
        elif name == WEIGHTS:
            self.server.both.wait(60)
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", "c" * 40)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Nothing: the test's output is its own."""


@contextmanager
def hub(folder: Path) -> Iterator[Hub]:
    with Hub(folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.timeout(180)
def test_two_actors_download_a_model_once(tmp_path: Path) -> None:
    with hub(ROOT / "examples/shapes/weights/clip") as server:
        told = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path),
            "HF_HUB_OFFLINE": "0",
        }
        actors = [
            subprocess.Popen(
                [sys.executable, "-c", ACTOR],
                cwd=ROOT,
                env={**os.environ, **told, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(2)
        ]
        for actor in actors:
            assert actor.stdout and actor.stdout.readline() == "ready\n"
        outputs: list[str] = []
        said = [threading.Thread(target=lambda a=a: outputs.append(a.communicate("\n")[0])) for a in actors]
        for thread in said:
            thread.start()
        for thread in said:
            thread.join(150)
    assert [actor.returncode for actor in actors] == [0, 0]
    assert len(outputs[0]) > 1 and outputs[0] == outputs[1]
    assert server.fetched[WEIGHTS] == 1 and set(server.fetched.values()) == {1}, server.fetched
