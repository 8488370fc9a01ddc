"""`densebridge jobs` on a real head: a job is listed, read, followed and left, stopped."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from typing import cast

import pytest

from jobs.head import Head, Job, connect
from jobs.jobs import _COMMAND, StopOptions, main, stop_job
from jobs.submit import SubmitOptions
from jobs.submit import environment as environment_of
from tests.ray_heads import PYTHON, ROOT, environment

pytestmark = pytest.mark.usefixtures("process_as_it_was")


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
        command,
        cwd=ROOT,
        env=environment(RAY_AUTH_MODE="disabled"),
        text=True,
        stdout=-1,
        stderr=-1,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which background jobs of shells ignore
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

    assert ended(["stop", job, *at]) == 0
    asked, over = capsys.readouterr().out.splitlines()
    assert asked.startswith(f"{job} is asked to end, which may take it up to 660 s") and over == f"{job} stopped"
    assert ended(["stop", job, *at]) == 0 and "had ended already: stopped" in capsys.readouterr().out
    assert ended(["logs", job, "--follow", *at]) == 3 and capsys.readouterr().out.endswith(f"{job} stopped\n")


def test_a_job_that_saves_before_it_ends_has_the_time(head: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Longer than the three seconds that Ray gives by itself; by what `submit` sets."""
    told = environment_of("train", SubmitOptions(root=str(ROOT)))["env_vars"]
    there = connect(head)
    trap = "trap 'sleep 5; echo has saved; exit 0' TERM; echo begun; while true; do sleep 0.2; done"
    job = there.submit(f'bash -c "{trap}"', {"env_vars": told}, cpus=0, gpus=0)
    end = time.monotonic() + 100
    while "begun" not in there.logs(job) and time.monotonic() < end:
        time.sleep(0.5)
    assert ended(["stop", job, "--address", head]) == 0
    assert "has saved" in there.logs(job), capsys.readouterr().out


class Waiting:
    """A head with a job that has no node."""

    stopped = False

    def job(self, job: str) -> Job:
        message = "Job has not started yet"
        return Job(id=job, command="x", status="pending", message=message, started=0.0, ended=None, code=None)

    def stop(self, job: str) -> None:
        self.stopped = True


def test_stopping_a_job_without_a_node_says_so_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    there = Waiting()
    with pytest.raises(SystemExit) as end:
        stop_job(cast("Head", there), "one", StopOptions())
    assert end.value.code == 4 and there.stopped
    assert "one has no node yet: Ray ends it when it gets one, or after 15 minutes" in capsys.readouterr().err


def test_commands_are_told_apart() -> None:
    for command in ("python -m jobs.build small.py --x 1", "densebridge build small.py --x 1"):
        ours = _COMMAND.search(command)
        assert ours and ours.groups() == ("build", "small.py")


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
