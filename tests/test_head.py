"""The door to a head: what stands at an address and is no head of ours, and what the real one tells."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from jobs import head as module
from jobs.head import Head, UnknownJob, connect, measure
from jobs.submit import EXCLUDES
from tests.ray_heads import ROOT, densebridge, free_ports, ray_head

RECIPE = "tests/small_recipe.py"


pytestmark = pytest.mark.usefixtures("process_as_it_was")


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


class Client:
    """Ray's, as far as a head asks it. What is submitted arrives, then the answer is lost or refused."""

    def __init__(self, problem: Exception, knows: bool = True) -> None:
        self.problem, self.knows, self.jobs = problem, knows, dict[str, object]()

    def _do_request(self, *_: object, **__: object) -> SimpleNamespace:
        return SimpleNamespace(json=lambda: {"ray_version": "2", "data": None})

    def submit_job(self, *, submission_id: str, entrypoint: str, **_: object) -> str:
        details = {"message": None, "start_time": 0, "end_time": None, "driver_exit_code": None}
        status = SimpleNamespace(value="PENDING")
        job = SimpleNamespace(submission_id=submission_id, entrypoint=entrypoint, status=status, **details)
        if self.knows:
            self.jobs[submission_id] = job
        raise self.problem

    def get_job_info(self, job: str) -> object:
        if job not in self.jobs:
            raise RuntimeError(f"Request failed with status code 404: Job {job} does not exist.")
        return self.jobs[job]


def test_a_job_that_arrived_is_submitted_though_the_answer_was_lost() -> None:
    client = Client(ConnectionResetError("cut"))
    there = Head("http://h", client)
    job = there.submit("true", {}, cpus=0, gpus=0)
    assert [job] == [*client.jobs] and there.job(job).status == "pending" and there.python == "?"
    with pytest.raises(ConnectionResetError, match="cut"):
        Head("http://h", Client(ConnectionResetError("cut"), knows=False)).submit("true", {}, cpus=0, gpus=0)


def test_what_a_head_refuses_is_named() -> None:
    from ray.exceptions import AuthenticationError

    with pytest.raises(PermissionError, match="http://h asks for a token and did not get the right one"):
        Head("http://h", Client(AuthenticationError("no"))).submit("true", {}, cpus=0, gpus=0)
    proxy = RuntimeError("Request failed with status code 404: nothing here.")
    with pytest.raises(RuntimeError, match=r"http://h cannot do it: .*nothing here"):
        Head("http://h", Client(proxy)).submit("true", {}, cpus=0, gpus=0)
    with pytest.raises(UnknownJob, match="knows no such job"):
        Head("http://h", Client(proxy)).job("raysubmit_none")


def test_no_call_outlives_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What uploads has longer than what does not."""
    monkeypatch.setattr(module, "CALL", 0.1)
    client, never = Client(OSError()), threading.Event()
    monkeypatch.setattr(client, "submit_job", lambda **_: never.wait(60))
    with pytest.raises(TimeoutError, match="http://h does not answer within 0 s: check --address"):
        Head("http://h", client).submit("true", {"working_dir": "local:///opt/densebridge"}, cpus=0, gpus=0)
    never.set()
    monkeypatch.setattr(client, "submit_job", lambda **_: "done")
    assert Head("http://h", client).submit("true", {"working_dir": "/here"}, cpus=0, gpus=0) == "done"


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
    """A job that a token let in, and the line for who has a wrong one."""
    token = os.urandom(24).hex()
    folder = short_folder / "t"
    folder.mkdir()
    arguments = ("submit", "plan", RECIPE, "--env", f"SMALL_FOLDER={tmp_path}", "--no-follow", "--address")
    with ray_head(folder, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token) as address:
        known = densebridge(*arguments, address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token)
        wrong = densebridge(*arguments, address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 48)
    assert known.returncode == 0 and "asks for no token" not in known.stderr, known.stderr
    assert token not in known.stdout + known.stderr
    assert wrong.returncode == 2 and "asks for a token and did not get the right one" in wrong.stderr
    assert len(wrong.stderr.splitlines()) == 1


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
    for name in ("densebridge.env", "a/.env"):
        (tmp_path / name).write_text("HF_TOKEN=secret\n")
    excludes = ["/skipped/", *(pattern for pattern in EXCLUDES if pattern.endswith("env"))]
    size, largest = measure(tmp_path, excludes)
    assert size == 3000 + 500 + 20 + len("*.bin\n") and largest.startswith("a/b 0.0 MB, a/two 0.0 MB, four")
    monkeypatch.setattr(packaging, "GCS_STORAGE_MAX_SIZE", 3000)
    with pytest.raises(ValueError, match=r"Ray takes less than 0 MB\. Largest: a/b .* use --root and an image"):
        measure(tmp_path, ["/skipped/"])


def test_the_repository_is_small() -> None:
    assert measure(ROOT, EXCLUDES)[0] < 30e6
