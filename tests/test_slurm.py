"""jobs/cluster/slurm.sh, run: two machines, both of which are this one, as `srun` is tests/fake_srun.py. The processes, their
signals, Ray's head and worker are real.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.small_stages import small_source, urls
from tests.training_fixtures import make_world

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "jobs" / "cluster" / "slurm.sh"


def slurm(folder: Path, **variables: str) -> dict[str, str]:
    """The environment of a job on two machines, both of which are this one: `srun` starts processes here."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    (programs / "srun").write_text(f"#!{sys.executable}\n{(ROOT / 'tests' / 'fake_srun.py').read_text()}")
    told = f'if [ "$1" = show ]; then printf "first\\nsecond\\n"; else echo "$@" >>{shlex.quote(str(folder))}/told; fi'
    (programs / "scontrol").write_text(f"#!/bin/bash\n{told}\n")
    for program in programs.iterdir():
        program.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SLURM_"))}
    path = os.pathsep.join((str(programs), str(Path(sys.executable).parent), kept["PATH"]))
    own = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "machine[1-2]", "SLURM_CPUS_PER_TASK": "1"}
    return {**kept, "PATH": path, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", **own, **variables}


@contextmanager
def batch(command: list[str], folder: Path, number: int) -> Iterator[subprocess.Popen[str]]:
    """slurm.sh with this job id, started as Slurm does; its log of Ray goes with the block."""
    with (folder / "said").open("w") as said:
        job = subprocess.Popen(
            ["bash", str(SCRIPT), *command],
            env=slurm(folder, SLURM_JOB_ID=str(number)),
            cwd=ROOT,
            stdout=said,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which background jobs of shells ignore
        )
        try:
            yield job
        finally:
            if job.poll() is None:
                job.terminate()  # it ends what it has started
                job.wait(60)
            (ROOT / f"ray-{number}.log").unlink(missing_ok=True)
            shutil.rmtree(f"/tmp/ray-{number}", ignore_errors=True)


def is_free(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) != 0


def wait_until(reached: Callable[[], bool], job: subprocess.Popen[str], folder: Path) -> None:
    end = time.monotonic() + 360
    while not reached():
        assert job.poll() is None and time.monotonic() < end, (folder / "said").read_text()[-3000:]
        time.sleep(0.1)


def test_slurms_script_wants_a_job_a_recipe_and_slurm(tmp_path: Path) -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    for command, number, message in (
        (["build"], "1", "give a job and a recipe"),
        (["build", "ella_sd15"], "", "this is no Slurm job"),
        (["bake", "ella_sd15"], "1", "no job bake for several machines: build or train"),
    ):
        told = slurm(tmp_path, SLURM_JOB_ID=number)
        done = subprocess.run(
            ["bash", str(SCRIPT), *command],
            env=told,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2 and done.stderr.startswith("slurm.sh: ") and message in done.stderr


TRAINING = """
import dataclasses
from pathlib import Path
from jobs.recipe import Recipe
from stages.source import Source
from tests.training_fixtures import training_config
folder = Path(__file__).parent
config = training_config(folder, checkpoint_every=120)
phases = (dataclasses.replace(config.phases[0], samples=1200, micro_batch=12),)
recipe = Recipe(
    name="two", dataset=str(folder / "dataset"), source=Source(path="none.parquet"), stages=(), runs=str(folder / "runs"),
    trainings={"tsc": dataclasses.replace(config, phases=phases)},
)
"""


@pytest.mark.timeout(900)
def test_under_slurm_a_training_is_queued_again_and_goes_on(tmp_path: Path) -> None:
    folder = make_world(tmp_path)
    (folder / "recipe.py").write_text(TRAINING)
    command, runs = ["train", str(folder / "recipe.py")], folder / "runs" / "tsc"
    with batch(command, folder, 41017) as job:
        wait_until(lambda: (runs / "log.jsonl").is_file() and (runs / "log.jsonl").stat().st_size > 0, job, folder)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(120) == 0
    assert (folder / "told").read_text() == "requeue 41017\n"
    assert "asked to stop: saved at" in (folder / "said").read_text() and not (runs / "release").exists()
    with batch(command, folder, 41017) as job:
        assert job.wait(240) == 0, (folder / "said").read_text()[-3000:]
    assert "going on from" in (folder / "said").read_text() and (runs / "release").is_dir()
    assert (folder / "told").read_text() == "requeue 41017\n"


SMALL = """
from pathlib import Path
from jobs.recipe import Recipe
from stages.source import Source
from tests.small_stages import Describe, Fetch, SmallConfig
folder = Path(__file__).parent
hangs = (folder / "hangs").read_text().split()
config = SmallConfig(calls=str(folder / "calls"), hang_at=tuple(hangs))
recipe = Recipe(
    name="small", dataset=str(folder / "dataset"), source=Source(path=str(folder / "source.parquet"), partition_size=5),
    stages=(Fetch(SmallConfig(calls=config.calls)), Describe(config)),
)
"""


@pytest.mark.timeout(900)
def test_under_slurm_a_build_has_a_cluster_of_its_own_and_goes_on(tmp_path: Path) -> None:
    """A real head and a real worker. One picture hangs until Slurm's warning comes; what was done by then is not done again."""
    rows = urls(15)
    small_source(tmp_path, rows)
    (tmp_path / "recipe.py").write_text(SMALL)
    (tmp_path / "hangs").write_text(rows[-1])
    calls, dataset = tmp_path / "calls", tmp_path / "dataset"
    number = next(n for n in range(40000 + os.getpid() % 5000, 50000) if is_free(20000 + n % 10000))
    with batch(["build", str(tmp_path / "recipe.py")], tmp_path, number) as job:
        wait_until(lambda: len(list(dataset.glob("describe-*/*.parquet"))) >= 2, job, tmp_path)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(120) == 0
    assert (tmp_path / "told").read_text() == f"requeue {number}\n"
    assert "stopped with exit code 130" in (tmp_path / "said").read_text()
    end = time.monotonic() + 60
    while any(f"/tmp/ray-{number}/" in " ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])):
        assert time.monotonic() < end, "the job has ended and its cluster has not"
        time.sleep(0.2)
    before = calls.read_text().count("describe")
    (tmp_path / "hangs").write_text("")
    again = [sys.executable, "-m", "jobs.cli", "build", str(tmp_path / "recipe.py"), "--runner", "local"]
    subprocess.run(again, cwd=ROOT, check=True, capture_output=True, timeout=120)
    assert calls.read_text().count("describe") - before <= 5 and calls.read_text().count("fetch") == 15
