"""`densebridge jobs` on a real head: a job is listed, read, followed and left, stopped."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
from collections.abc import Iterator

import pytest

from jobs.head import Head, connect
from jobs.jobs import main
from tests.ray_heads import PYTHON, ROOT, environment


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Connecting changes the process: in a command's it may."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    yield
    logging.disable(logging.NOTSET)


def ended(arguments: list[str]) -> int:
    """The exit status, however it comes."""
    try:
        return main(arguments)
    except SystemExit as end:
        return int(str(end.code))


def start(there: Head) -> str:
    """A job that looks like a build, says a word and sleeps."""
    code = "import time; print('a word', flush=True); time.sleep(600)"
    return there.submit(f'python -c "{code}" -m jobs.build small.py', {}, cpus=0, gpus=0)


@pytest.mark.timeout(600)
def test_a_job_is_listed_followed_left_and_stopped(head: str, capsys: pytest.CaptureFixture[str]) -> None:
    at = ["--address", head]
    job = start(connect(head))
    command = [str(PYTHON), "-m", "jobs.cli", "jobs", "logs", job, "--follow", *at]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(RAY_AUTH_MODE="disabled"), text=True, stdout=-1, stderr=-1
    ) as followed:
        assert followed.stdout and followed.stderr
        assert any(line == "a word\n" for line in followed.stdout)
        followed.send_signal(signal.SIGINT)
        assert followed.wait(60) == 130
        told = followed.stderr.read()
    assert f"the job goes on: `densebridge jobs logs {job} --address {head} --follow` shows it" in told
    assert f"`densebridge jobs stop {job} --address {head}` ends it" in told

    capsys.readouterr()
    assert ended(["list", *at]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == ["id", "job", "recipe", "status", "started", "(UTC)", "seconds"]
    row = next(line.split() for line in shown if line.startswith(job))
    assert row[1:4] == ["build", "small.py", "running"] and float(row[-1]) > 0
    assert ended(["list", "--json", *at]) == 0
    assert job in [found["id"] for found in json.loads(capsys.readouterr().out)]
    assert ended(["logs", job, *at]) == 0 and "a word\n" in capsys.readouterr().out

    assert ended(["stop", job, *at]) == 0 and capsys.readouterr().out == f"{job} stopped\n"
    assert ended(["stop", job, *at]) == 0 and "had ended already: stopped" in capsys.readouterr().out
    assert ended(["logs", job, "--follow", *at]) == 3 and capsys.readouterr().out.endswith(f"{job} stopped\n")


@pytest.mark.parametrize("action", ["logs", "stop"])
def test_an_unknown_job_is_one_line(action: str, head: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended([action, "raysubmit_none", "--address", head]) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 2  # with the warning
    assert "knows no such job: `densebridge jobs list --address" in said.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["halt"], "choose one of list, logs, stop"),
        (["stop"], "needs a job's id first"),
        (["logs", "--follow"], "needs a job's id first"),
        (["stop", "x", "--wait", "-1"], "wait cannot be negative"),
        (["list", "--address", "head:8265"], "must start with http://"),
    ],
)
def test_what_is_wrong_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(arguments) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1
