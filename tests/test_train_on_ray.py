"""`densebridge train --address` on a real cluster: as torchrun, after a node is lost, and what cannot work in one line."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import RayActorError
from ray.train import ControllerError, WorkerGroupError
from safetensors.torch import load_file

from jobs import train_on_ray as module
from jobs.train import TrainOptions
from jobs.train_on_ray import (
    WorkerLostError,
    _cause,
    _patience,
    _resource,
    _room,
    _Run,
    _sittings,
    train_on_ray,
    worker_counts,
)
from pipeline.ray_cluster import GROWTH
from pipeline.ray_head import HeadWatch
from pipeline.storage import Folder
from pipeline.workers import StageError
from tests.ray_heads import free_ports
from tests.training_fixtures import log_of, make_world, training_config
from training.configuration import Phase

ROOT = Path(__file__).resolve().parent.parent
RAY = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_agent_register_timeout_ms": "120000",  # nodes of a busy machine need longer to come up than Ray grants them
    "RAY_health_check_period_ms": "500",  # of 3,000: after five that fail a node is lost
}
# Two phases of 8 and 6 steps, of many small parts, so that a step takes long enough to be interrupted.
RECIPE = """
import dataclasses, os
from pathlib import Path
from jobs.recipe import Recipe
from stages.source import Source
from pipeline.workers import StageError
from tests.training_fixtures import training_config
root = Path(__file__).parent
config = training_config(root, log_every=1, checkpoint_every=60)
small, large = config.phases
phases = (
    dataclasses.replace(small, samples=480, batch=60, micro_batch=1, warmup_samples=120),
    dataclasses.replace(large, samples=360, batch=60, micro_batch=1),
)
recipe = Recipe(
    name="two", dataset=str(root / "dataset"), source=Source(path="none.parquet"), stages=(), runs=os.environ["RUNS"],
    trainings={"tsc": dataclasses.replace(config, phases=phases)},
)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_world(tmp_path_factory.mktemp("world"))
    (folder / "recipe.py").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def straight(world: Path) -> Path:
    """The run of two processes that torchrun started, never stopped."""
    process = start(world, "straight", "--processes", "2")
    told, said = process.communicate(timeout=250)
    assert process.returncode == 0, told + said
    return world / "straight" / "tsc"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without cores, and two nodes with one each."""
    from ray.cluster_utils import Cluster

    ports = ("runtime_env_agent_port", "metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port")
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(prefix="dbray", dir="/tmp", ignore_cleanup_errors=True) as folder,
    ):  # a short name: Ray's sockets lie in it, and a socket's path may have 107 letters
        for name, value in RAY.items():
            patch.setenv(name, value)
        running = Cluster()
        try:
            for cpus in (
                {"num_cpus": 0, "include_dashboard": False, "temp_dir": folder},
                {"num_cpus": 1},
                {"num_cpus": 1},
            ):
                named = dict(zip(ports, free_ports(4), strict=True))  # which a node must choose itself else, for long
                running.add_node(object_store_memory=80 << 20, **named, **cpus)
            yield running
        finally:
            running.shutdown()


def start(world: Path, runs: str, *flags: str) -> subprocess.Popen[str]:
    environment = {**os.environ, **RAY, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RUNS": str(world / runs)}
    command = [sys.executable, "-m", "jobs.cli", "train", str(world / "recipe.py"), *flags]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def wait_until_saved(run: Path, process: subprocess.Popen[str], samples: int) -> None:
    """Until it has saved at so many samples or later."""
    end = time.monotonic() + 200
    while time.monotonic() < end and process.poll() is None:
        if any(int(path.name.removeprefix("checkpoint-")) >= samples for path in run.glob("checkpoint-*")):
            return
        time.sleep(0.05)


@pytest.mark.timeout(300)
def test_what_cannot_work_is_told_in_one_line(cluster: Any, world: Path) -> None:
    flags = ("--processes", "1", "--address", cluster.address, "--tsc.connector.in-width", "9")
    process = start(world, "wrong", *flags)
    told, said = process.communicate(timeout=250)
    assert process.returncode == 1 and "connector.in_width is 9, the models here want 16" in said, told + said
    assert said.startswith("densebridge: ") and len(said.splitlines()) == 1 and "Traceback" not in told


@pytest.mark.timeout(600)
def test_two_workers_are_torchruns_two_processes_and_go_on_as_one_where_a_node_is_lost(
    cluster: Any, world: Path, straight: Path
) -> None:
    """The last test that has the cluster's two nodes: one is lost. Without Ray the run then goes on to its end."""
    run, flags = world / "onray" / "tsc", ("--processes", "2", "--least-processes", "1", "--address", cluster.address)
    process = start(world, "onray", *flags)
    wait_until_saved(run, process, 240)
    cluster.remove_node(cluster.list_all_nodes()[-1], allow_graceful=False)
    assert process.stdout and process.stderr
    told = ""
    while "1 processes on cpu" not in told and (line := process.stdout.readline()):  # not before the one is at work
        told += line
    process.send_signal(signal.SIGTERM)
    told, said = told + process.stdout.read(), process.stderr.read()
    assert process.wait(250) == 75 and "asked to stop: saved at" in told and said == "", told + said
    assert "2 workers on the cluster, with one of its CPU cores each" in told
    assert "a worker was lost (" in told and "1 workers on the cluster" in told, told
    assert not list(run.glob(".shared.*"))
    by_two = int(re.findall(r"going on from \S+ at (\d+) samples", told)[-1])
    told, said = start(world, "onray", "--processes", "1").communicate(timeout=250)
    assert "going on from" in told and "tsc: 840 samples in 14 steps" in told, told + said
    ours, theirs = log_of(run), log_of(straight)
    assert [(line["step"], line["samples"], line["lr"]) for line in ours] == [
        (line["step"], line["samples"], line["lr"]) for line in theirs
    ]
    same = [line["samples"] <= by_two for line in ours].index(False)
    assert same >= 4 and ours[:same] == theirs[:same]  # bit for bit, until the node is lost
    for key, one in load_file(run / "release" / "connector.safetensors").items():
        two = load_file(straight / "release" / "connector.safetensors")[key]
        if key.endswith("in_proj_bias"):  # a key's bias has no gradient but rounding, which Adam makes large
            one, two = (torch.cat([bias.chunk(3)[0], bias.chunk(3)[2]]) for bias in (one, two))
        assert torch.allclose(one, two, atol=1e-4), key


@given(batch=st.sampled_from([8, 12, 48, 256]), micro=st.sampled_from([1, 2, 4]), most=st.integers(1, 40))
def test_every_count_of_workers_shares_the_batches(batch: int, micro: int, most: int) -> None:
    config = training_config(
        Path("nowhere"), phases=(Phase(view="v", resolution=8, samples=batch, batch=batch, micro_batch=micro),)
    )
    counts = worker_counts(config, most, 1)
    assert counts == sorted(counts, reverse=True) and counts[-1] == 1
    for count in range(1, most + 1):
        share = batch // count
        assert (count in counts) == (batch % count == 0 and share % min(micro, share) == 0)


def test_no_count_of_workers_says_what_would_do() -> None:
    with pytest.raises(ValueError, match="choose a number of processes that divides 12"):
        worker_counts(training_config(Path("nowhere")), 11, 7)


def test_a_lost_worker_is_told_from_a_mistake_and_from_a_fault() -> None:
    gone = RayActorError()
    cut = RuntimeError("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4711")
    mistake, fault = ValueError("no view 'nowhere'"), KeyError("a")
    assert _cause(WorkerGroupError("", {0: cut, 1: mistake})) is mistake
    broken = WorkerGroupError("", {0: cut, 1: fault})
    assert _cause(broken) is broken
    lost = [
        WorkerGroupError("", {0: cut}),
        WorkerGroupError("", {0: cut, 1: gone}),
        WorkerGroupError("", {0: OSError(errno.ESTALE, "Stale file handle"), 1: TimeoutError("no answer")}),
        ControllerError(RuntimeError("late")),
    ]
    assert all(isinstance(_cause(error), WorkerLostError) for error in lost)
    assert "\n" not in str(_cause(lost[1]))


def test_a_cluster_that_is_not_there_and_a_relative_folder_are_named(world: Path, tmp_path: Path) -> None:
    config, dataset = training_config(world), Folder(url=str(world / "dataset"))
    options = TrainOptions(address="127.0.0.1:9", processes=2)
    with pytest.raises(StageError, match=r"cannot join the Ray cluster at 127\.0\.0\.1:9: "):
        train_on_ray(config, dataset=dataset, run=tmp_path / "run", options=options)
    with pytest.raises(ValueError, match="runs 'runs' is relative: give an absolute path"):
        train_on_ray(config, dataset=dataset, run=Path("runs/tsc"), options=options)


@pytest.mark.parametrize("least", [0, 3])
def test_options_are_checked(least: int) -> None:
    with pytest.raises(ValueError, match="it must be from 1 to processes"):
        TrainOptions(processes=2, least_processes=least, address="auto")
    with pytest.raises(ValueError, match="wait_minutes cannot be negative"):
        TrainOptions(wait_minutes=-1, address="auto")
    for alone in ({"least_processes": 1}, {"on": "cpu"}, {"wait_minutes": 0.0}):
        with pytest.raises(ValueError, match="are of a cluster: give its --address"):
            TrainOptions(**alone)  # type: ignore[arg-type]


class Cluster:
    """Ray as far as room is looked for: places for so many workers, after they were asked for so often."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, places: int, after: int = 0, grows: bool = False) -> None:
        self.places, self.after, self.asked = places, after, list[int]()
        self._now = 0.0
        monkeypatch.setattr(module, "placement_group", lambda bundles: Group(self, len(bundles)))
        monkeypatch.setattr(module, "remove_placement_group", lambda group: None)
        monkeypatch.setattr(module, "may_grow", lambda: grows)
        monkeypatch.setattr(module.ray, "nodes", lambda: [])
        monkeypatch.setattr(module.ray, "cluster_resources", lambda: {"CPU": float(places)})
        monkeypatch.setattr(module.ray, "available_resources", lambda: {"CPU": float(places)})
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self._now, sleep=self.wait))

    def wait(self, seconds: float) -> None:
        self._now += seconds


class Group:
    """A placement group of it."""

    def __init__(self, cluster: Cluster, count: int) -> None:
        self._cluster, self._count = cluster, count

    def wait(self, seconds: float) -> bool:
        self._cluster.wait(seconds)
        self._cluster.asked.append(self._count)
        return self._count <= self._cluster.places and len(self._cluster.asked) > self._cluster.after


def a_run(counts: list[int], patience: float, folder: Path = Path("none")) -> _Run:
    task = SimpleNamespace(run=folder)
    asked, head = threading.Event(), HeadWatch("")
    return _Run(task=task, counts=counts, resource="CPU", patience=patience, board=None, asked=asked, head=head)  # type: ignore[arg-type]


def test_what_is_waited_for_is_said_at_once_and_every_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Cluster(monkeypatch, places=4, after=130)
    assert _room(a_run([4, 2], 600), lost=False) == 4
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["waiting up to 10 min for 4 CPU cores and the cluster has 4, 4 of them free"] * 3
    Cluster(monkeypatch, places=3)
    with pytest.raises(
        ValueError, match=r"asks for 4 CPU cores and the cluster has 3, 3 of them free: lower --processes"
    ):
        _room(a_run([8, 4], 0), lost=False)
    assert capsys.readouterr().out == ""


def test_after_a_loss_only_the_fewest_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    there = Cluster(monkeypatch, places=2, after=100)
    assert _room(a_run([8, 4, 2], 600), lost=True) == 2
    assert there.asked.count(8) == there.asked.count(4) == 5 and there.asked.count(2) == 91
    there = Cluster(monkeypatch, places=2)
    assert _room(a_run([8, 4, 2], 60), lost=False) == 2 and there.asked.count(8) == 65


def test_a_cpu_core_is_taken_only_where_no_gpu_can_come(monkeypatch: pytest.MonkeyPatch) -> None:
    Cluster(monkeypatch, places=2)
    assert (_resource("auto"), _resource("gpu"), _patience(None), _patience(2)) == ("CPU", "GPU", 0.0, 120.0)
    Cluster(monkeypatch, places=2, grows=True)
    assert (_resource("auto"), _resource("cpu"), _patience(None), _patience(0)) == ("GPU", "CPU", GROWTH, 0.0)


def test_three_losses_in_a_row_end_it_and_a_checkpoint_begins_a_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each letter is a sitting: lost, or lost after it has saved."""
    Cluster(monkeypatch, places=1)
    for sittings, held in (("LLL", 3), ("LLSLL", 5), ("SLSLSLL", 7)):
        run, held_so_far = a_run([1], 0, tmp_path / sittings), list[str]()
        run.task.run.mkdir()

        def sitting(run: _Run, count: int, kinds: str = sittings, done: list[str] = held_so_far) -> None:
            done.append(kinds[len(done)])
            if done[-1] == "S":
                (run.task.run / f"checkpoint-{len(done):09d}").mkdir()
            raise WorkerLostError("gone")

        monkeypatch.setattr(module, "_sitting", sitting)
        with pytest.raises(ChildProcessError, match="lost 3 times in a row without a new checkpoint, at last: gone"):
            _sittings(run)
        assert len(held_so_far) == held
