"""Ray heads of the tests' own: real ones, which end with their block, and a fixture of one that files share."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from benchmarks.nodes import free_ports as free_ports

PYTHON = Path(sys.executable)
ROOT = Path(__file__).resolve().parents[1]


def environment(**changes: str) -> dict[str, str]:
    """Ours, without what would point ray elsewhere; `python` is this one."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "SMALL_"))}
    path = f"{PYTHON.parent}{os.pathsep}{kept.get('PATH', '')}"
    patient = {"RAY_worker_register_timeout_seconds": "200"}  # Ray's 60 are too few for a very busy machine
    return {**kept, **patient, "PATH": path, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", **changes}


@contextmanager
def ray_head(temporary: Path, **variables: str) -> Iterator[str]:
    """The dashboard's address of a head of its own, which ends with the block."""
    address, process = start_head(temporary, environment(**variables))
    try:
        yield address
    finally:
        end(process)


def start_head(temporary: Path, variables: dict[str, str], tries: int = 3) -> tuple[str, subprocess.Popen[bytes]]:
    """The dashboard's address and the head's process. Ray gives a node 30 s to start, too few for a very busy machine: so it is
    tried again."""
    port, dashboard, *agents = free_ports(6)
    command = [str(PYTHON.parent / "ray"), "start", "--head", "--block", f"--port={port}", "--num-cpus=2"]
    command += [f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", "--include-dashboard=true"]
    command += ["--node-ip-address=127.0.0.1", "--disable-usage-stats"]
    # Named, so that the node need not wait for its agents to tell theirs: it gives up after 15 s.
    kinds = ("dashboard-agent-listen", "dashboard-agent-grpc", "runtime-env-agent", "metrics-export")
    command += [f"--{kind}-port={number}" for kind, number in zip(kinds, agents, strict=True)]
    command += [f"--temp-dir={temporary}", f"--object-store-memory={128 << 20}"]
    said = temporary / "head.log"
    with said.open("w") as log:
        process = subprocess.Popen(
            command, env=variables, stdout=log, stderr=log, start_new_session=True, cwd=temporary
        )
    address = f"http://127.0.0.1:{dashboard}"
    if is_up(address, process, said):
        return address, process
    end(process)
    if tries == 1:
        raise RuntimeError(f"the head did not come up: {said.read_text()[-2000:]}")
    return start_head(temporary, variables, tries - 1)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kills the head with all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)


def is_up(address: str, process: subprocess.Popen[bytes], log: Path) -> bool:
    """Whether the node is up and the dashboard answers, within 150 s."""
    late = time.monotonic() + 150
    while time.monotonic() < late and process.poll() is None:
        try:
            if "Ray runtime started" in log.read_text():
                urllib.request.urlopen(f"{address}/api/version", timeout=5).close()
                return True
        except urllib.error.HTTPError:
            return True  # it asks for a token
        except OSError:
            pass
        time.sleep(0.3)
    return False


@pytest.fixture(scope="session")
def short_folder() -> Iterator[Path]:
    """A folder with a short name: ray's sockets lie in it, and a socket's path may have 107 letters."""
    with tempfile.TemporaryDirectory(prefix="dbray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def head(short_folder: Path) -> Iterator[str]:
    """Address of a head without GPUs that asks for no token, one for all files."""
    with ray_head(short_folder, RAY_AUTH_MODE="disabled") as address:
        yield address


def densebridge(*arguments: str, timeout: float = 360, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command, in a process of its own."""
    given = {"RAY_AUTH_MODE": "disabled", **variables}
    return subprocess.run(
        [str(PYTHON), "-m", "jobs.cli", *arguments],
        env=environment(**given),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture
def process_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Connecting changes the process: in a command's it may."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    yield
    logging.disable(logging.NOTSET)
