"""The door to a head: what stands at an address and is no head of ours, and what the real one tells."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from jobs import head as module
from jobs.head import UnknownJob, connect, measure, within
from tests.ray_heads import ROOT, densebridge, free_ports, ray_head

RECIPE = "tests/small_recipe.py"


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Connecting changes the process: in a command's it may."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    yield
    logging.disable(logging.NOTSET)


@contextmanager
def server(pages: dict[str, tuple[int, str]]) -> Iterator[str]:
    """A web server that knows these pages."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, text = pages.get(self.path, (404, "not here"))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as there:
        threading.Thread(target=there.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{there.server_port}"
        there.shutdown()


@pytest.mark.parametrize(
    ("pages", "message"),
    [
        ({}, "answers 404, so it is no Ray dashboard"),
        ({"/api/version": (200, "<html>")}, "answers, but not as a Ray dashboard does"),
        ({"/api/version": (200, '{"version": "1"}')}, "answers, but not as a Ray dashboard does"),
    ],
)
def test_what_is_no_dashboard_is_named(pages: dict[str, tuple[int, str]], message: str) -> None:
    with server(pages) as address, pytest.raises(ConnectionError, match=message):
        connect(address)


def test_nobody_and_somebody_who_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConnectionError, match="no Ray dashboard answers at"):
        connect(f"http://127.0.0.1:{free_ports(1)[0]}")
    monkeypatch.setattr(module, "_FIRST", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises((ConnectionError, TimeoutError), match="check --address"):
            connect(f"http://127.0.0.1:{silent.getsockname()[1]}")
    with pytest.raises(ValueError, match="must start with http://"):
        connect("localhost:8265")


def test_no_call_outlives_its_time() -> None:
    with pytest.raises(TimeoutError, match="http://h does not answer within 0 s: check --address"):
        within(0.1, lambda: time.sleep(2), "http://h")
    assert within(5.0, lambda: "an answer", "http://h") == "an answer"


def test_another_ray_or_python_is_refused_with_both_versions(tmp_path: Path) -> None:
    """A head of an older Ray, as far as it is asked."""
    pages = {
        "/api/version": (200, json.dumps({"version": "4", "ray_version": "2.9.0"})),
        "/api/v0/cluster_metadata": (200, json.dumps({"data": {"rayVersion": "2.9.0", "pythonVersion": "3.9.18"}})),
    }
    with server(pages) as address:
        done = densebridge("submit", "plan", RECIPE, "--address", address, SMALL_FOLDER=str(tmp_path))
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert "runs Ray 2.9.0 and Python 3.9.18, here are Ray 2." in line and "use an image and --root" in line


def test_the_head_tells_of_itself(head: str, capsys: pytest.CaptureFixture[str]) -> None:
    there = connect(f"{head}/")
    import ray

    assert there.ray == ray.__version__ and there.python == ".".join(map(str, sys.version_info[:3]))
    assert [node["CPU"] for node in there.nodes()] == [2.0]
    for ask in (there.job, there.logs, there.stop):
        with pytest.raises(UnknownJob, match="knows no such job: `densebridge jobs list"):
            ask("raysubmit_none")
    assert "asks for no token" in capsys.readouterr().err


@pytest.mark.timeout(800)
def test_a_head_that_wants_a_token_gets_rays(tmp_path: Path, short_folder: Path) -> None:
    """A job that a token let in, and the line for who has none, or a wrong one."""
    token = os.urandom(24).hex()
    folder = short_folder / "t"
    folder.mkdir()
    arguments = ("submit", "plan", RECIPE, "--env", f"SMALL_FOLDER={tmp_path}", "--no-follow", "--address")
    with ray_head(folder, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token) as address:
        known = densebridge(*arguments, address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token)
        wrong = densebridge(*arguments, address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 48)
        none = densebridge("jobs", "list", "--address", address, RAY_AUTH_MODE="disabled")
    assert known.returncode == 0 and "asks for no token" not in known.stderr, known.stderr
    assert token not in known.stdout + known.stderr
    for refused in (wrong, none):
        assert refused.returncode == 2 and "asks for a token and did not get the right one" in refused.stderr
        assert len(refused.stderr.splitlines()) == 1


def test_what_travels_is_measured_as_ray_packs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private.runtime_env import packaging

    for name, size in (
        ("a/b/one", 3000),
        ("a/two", 500),
        ("skipped/three", 9000),
        ("c/ignored.bin", 9000),
        ("four", 20),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    (tmp_path / ".gitignore").write_text("*.bin\n")
    size, largest = measure(tmp_path, ["/skipped/"])
    assert size == 3000 + 500 + 20 + len("*.bin\n") and largest.startswith("a/b 0.0 MB, a/two 0.0 MB, four")
    monkeypatch.setattr(packaging, "GCS_STORAGE_MAX_SIZE", 3000)
    with pytest.raises(ValueError, match=r"Ray takes less than 0 MB\. Largest: a/b .* use --root and an image"):
        measure(tmp_path, ["/skipped/"])


def test_the_repository_is_small() -> None:
    from jobs.submit import EXCLUDES

    assert measure(ROOT, EXCLUDES)[0] < 30e6
