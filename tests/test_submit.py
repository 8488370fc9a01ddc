"""Submitting to a real local head: a build that succeeds, one that fails, and what cannot be submitted."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from jobs.submit import ROOT, SubmitOptions, _within, check_places, entrypoint
from pipeline.funnel import count_funnel
from pipeline.partitions import list_partitions
from pipeline.plan import make_plan
from pipeline.storage import Folder
from tests.small_recipe import recipe
from tests.small_stages import SmallConfig, small_source, small_stages, urls

RECIPE = "tests/small_recipe.py"
PYTHON = Path(sys.executable)


def free_ports(count: int) -> list[int]:
    """Ports outside 10002-19999, which the head keeps for its workers."""
    found: list[int] = []
    for port in range(23000 + os.getpid() % 5000, 60000):
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)) != 0:
                found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError("no free port")


def environment(**changes: str) -> dict[str, str]:
    """Ours, without what would point ray elsewhere; `python` is this one."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "SMALL_"))}
    path = f"{PYTHON.parent}{os.pathsep}{kept.get('PATH', '')}"
    return {**kept, "PATH": path, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", **changes}


@contextmanager
def ray_head(temporary: Path, **variables: str) -> Iterator[str]:
    """The dashboard's address of a head of its own, which ends with the block."""
    port, dashboard, agent = free_ports(3)
    command = [str(PYTHON.parent / "ray"), "start", "--head", "--block", f"--port={port}", "--num-cpus=2"]
    command += [f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", "--include-dashboard=true"]
    command += ["--node-ip-address=127.0.0.1", f"--dashboard-agent-listen-port={agent}", "--disable-usage-stats"]
    command += [f"--temp-dir={temporary}", f"--object-store-memory={128 << 20}"]
    with (temporary / "head.log").open("w") as log:
        process = subprocess.Popen(
            command, env=environment(**variables), stdout=log, stderr=log, start_new_session=True, cwd=temporary
        )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        wait_for(address, process, temporary / "head.log")
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until the dashboard answers, at most 90 s."""
    end = time.monotonic() + 90
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/api/version", timeout=5).close()
            return
        except urllib.error.HTTPError:
            return  # it asks for a token
        except OSError:
            time.sleep(0.3)
    raise RuntimeError(f"the head did not come up: {log.read_text()[-2000:]}")


@pytest.fixture(scope="module")
def short_folder() -> Iterator[Path]:
    """A folder with a short name: ray's sockets lie in it, and a socket's path may have 107 letters."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="dbray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def head(short_folder: Path) -> Iterator[str]:
    with ray_head(short_folder, RAY_AUTH_MODE="disabled") as address:
        yield address


def submit(*arguments: str, timeout: float = 200, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [str(PYTHON), "-m", "jobs.cli", "submit", *arguments]
    given = {"RAY_AUTH_MODE": "disabled", **variables}
    return subprocess.run(
        command, env=environment(**given), cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.mark.timeout(400)
def test_a_build_runs_on_the_cluster(head: str, tmp_path: Path) -> None:
    small_source(tmp_path, urls(17))
    given = ("--env", f"SMALL_FOLDER={tmp_path}", "--", "--fetch.batch-size", "2")
    done = submit("build", RECIPE, "--address", head, *given)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "python -m jobs.build tests/small_recipe.py --address auto --fetch.batch-size 2" in done.stdout
    assert "funnel" in done.stdout and done.stdout.rstrip().endswith("succeeded")
    assert "asks for no token" in done.stderr and len(done.stderr.splitlines()) == 1
    dataset = Folder(url=str(tmp_path / "dataset"))
    stages = small_stages(SmallConfig(), choose=SmallConfig(least=11))
    plan = make_plan(dataset, stages, list_partitions(dataset))
    assert plan.is_empty and count_funnel(dataset, stages, plan.tickets)["fetch"].given == 17
    (run,) = (tmp_path / "dataset" / "runs").rglob("run.json")
    assert '"commit": null' not in run.read_text() or not (ROOT / ".git").exists()


@pytest.mark.timeout(400)
def test_a_failing_build_ends_with_1_and_the_stages_message(head: str, tmp_path: Path) -> None:
    small_source(tmp_path, urls(4))
    given = ("--env", f"SMALL_FOLDER={tmp_path}", "SMALL_BREAK=1")
    done = submit("build", RECIPE, "--address", head, *given, "--", "--runner", "local")
    assert done.returncode == 1, done.stdout + done.stderr
    assert (
        "densebridge: stage 'describe', partition 000000-" in done.stdout
        and "RuntimeError: no model here" in done.stdout
    )
    assert "Traceback" not in done.stdout + done.stderr and done.stdout.rstrip().endswith("failed")


def test_without_following_it_returns_at_once(head: str, tmp_path: Path) -> None:
    done = submit("plan", RECIPE, "--address", head, "--no-follow", "--env", f"SMALL_FOLDER={tmp_path}")
    assert done.returncode == 0 and "submitted raysubmit_" in done.stdout and "succeeded" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("build", RECIPE), "no Ray dashboard answers at http://127.0.0.1:"),
        (("bake", RECIPE), "no job 'bake' to submit: "),
        (("build", "tests/none.py"), "no recipe at tests/none.py"),
        (("build", RECIPE, "--env", "HF_TOKEN=1"), "env HF_TOKEN looks like a secret"),
    ],
)
def test_what_cannot_be_submitted_says_so_in_one_line(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{free_ports(1)[0]}"
    done = submit(*arguments, "--address", address, timeout=60, SMALL_FOLDER=str(tmp_path))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("densebridge: ") and message in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.timeout(240)
def test_a_head_that_wants_a_token_gets_rays(tmp_path: Path, short_folder: Path) -> None:
    """A job that a token let in, and the line for who has none, or a wrong one."""
    token = os.urandom(24).hex()
    folder = short_folder / "t"
    folder.mkdir()
    arguments = ("plan", RECIPE, "--env", f"SMALL_FOLDER={tmp_path}", "--no-follow", "--address")
    with ray_head(folder, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token) as address:
        known = submit(*arguments, address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token)
        wrong = submit(*arguments, address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 48)
        none = submit(*arguments, address, RAY_AUTH_MODE="disabled")
    assert known.returncode == 0 and "asks for no token" not in known.stderr, known.stderr
    assert token not in known.stdout + known.stderr
    for refused in (wrong, none):
        assert refused.returncode == 2 and "asks for a token and did not get the right one" in refused.stderr
        assert len(refused.stderr.splitlines()) == 1


def test_the_command_names_the_recipe_from_the_root() -> None:
    assert entrypoint("plan", str(ROOT / RECIPE), []) == f"python -m jobs.plan {RECIPE}"
    assert entrypoint("train", "ella_sd15", ["--processes", "8"]) == "python -m jobs.train ella_sd15 --processes 8"
    with pytest.raises(ValueError, match="which is what goes to the cluster"):
        entrypoint("build", "/elsewhere/recipe.py", [])


def test_folders_that_end_with_the_job_are_refused() -> None:
    with pytest.raises(ValueError, match=r"dataset 'build/small/dataset' is relative"):
        check_places("build", recipe)


def test_options_are_checked() -> None:
    for wrong, message in (
        ({"address": "localhost:8265"}, "must start with http://"),
        ({"env": ("A",)}, "NAME=VALUE"),
        ({"gpus": -1.0}, "cannot be negative"),
    ):
        with pytest.raises(ValueError, match=message):
            SubmitOptions(**wrong)
    assert SubmitOptions(env=("A=b=c",)).variables == {"A": "b=c"}


def test_a_head_that_does_not_answer_is_named() -> None:
    with pytest.raises(TimeoutError, match="the head does not answer within 0 s: check --address"):
        _within(0.1, lambda: time.sleep(2))
    assert _within(5.0, lambda: "an answer") == "an answer"
