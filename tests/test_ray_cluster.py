"""Builds on a cluster of three nodes: who is joined, where stages run, how pools grow, and what is said where nodes lack."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import ray_cluster, ray_head, ray_waiting
from pipeline.ray_cluster import join_cluster
from pipeline.ray_head import HeadLost, follow
from pipeline.ray_waiting import actor_class
from pipeline.stage import Needs
from pipeline.storage import Folder
from pipeline.workers import StageError
from tests.ray_heads import free_ports
from tests.small_stages import SmallConfig, small_source, small_stages, urls
from tests.test_engine import digests, run

LIGHT = Needs(cpus=0.1)
SPOT = Needs(cpus=0.1, resources=("captioner=1",), labels=("market-type=in(spot,free)",), actors=(1, 3))


def add_node(cluster: Any, **arguments: Any) -> Any:
    """With ports of its own: a node that must choose them gives up where the machine is busy."""
    names = ("runtime_env_agent_port", "metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port")
    ports = dict(zip(names, free_ports(4), strict=True))
    return cluster.add_node(object_store_memory=100 << 20, **ports, **arguments)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes without and one with what the captions need; this process is joined to it."""
    import ray
    from ray.cluster_utils import Cluster

    patient = pytest.MonkeyPatch()  # on a busy machine Ray's raylet gives up on the processes beside it after 30 s
    patient.setenv("RAY_agent_register_timeout_ms", "150000")
    patient.setenv("RAY_raylet_start_wait_time_s", "150")
    patient.setenv("RAY_health_check_period_ms", "500")  # of 3,000: after five that fail a node is lost
    made = Cluster()
    add_node(made, num_cpus=2, include_dashboard=False)
    add_node(made, num_cpus=1)
    add_node(made, num_cpus=3, resources={"captioner": 3}, labels={"market-type": "spot"})
    join_cluster(made.address)
    yield made
    ray.shutdown()
    made.shutdown()
    patient.undo()


@pytest.fixture
def config(tmp_path: Path) -> SmallConfig:
    return SmallConfig(calls=str(tmp_path / "calls"), needs=LIGHT)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Looks at the cluster often. The lines that are said."""
    said: list[str] = []
    monkeypatch.setattr(ray_head, "LOOK", 0.2)
    monkeypatch.setattr(ray_waiting, "LOOK", 0.2)
    monkeypatch.setattr(ray_waiting, "print", lambda line, flush: said.append(line), raising=False)
    return said


def build(tmp_path: Path, config: SmallConfig, needs: Needs, rows: int = 15, **options: Any) -> Folder:
    """The four small stages on the cluster, `describe` with these needs."""
    dataset = Folder(url=str(tmp_path / "ray"))
    stages = small_stages(config, describe=replace(config, needs=needs, seconds=0.3))
    run(dataset, stages, small_source(tmp_path, urls(rows)), "ray", **options)
    return dataset


def actors_of(stage: str, earlier: Iterable[str] = ()) -> list[dict[str, Any]]:
    """Those of the stage's pools that were placed, dead ones as well; `earlier`: ids of those that do not count."""
    from ray._private.state import actors

    of = f"MapWorker(MapBatches({stage}))"
    named = [a for i, a in actors().items() if a["ActorClassName"] == of and i not in {*earlier}]
    return [a for a in named if a["StartTime"]]


def known() -> set[str]:
    """Ids of all actors until now."""
    from ray._private.state import actors

    return {*actors()}


@pytest.mark.timeout(240)
def test_a_pool_grows_on_the_nodes_that_its_stage_asks_for(cluster: Any, tmp_path: Path, config: SmallConfig) -> None:
    import ray

    earlier = known()
    build(tmp_path, config, SPOT, rows=50)
    found = actors_of("describe", earlier)
    spot = [n["NodeID"] for n in ray.nodes() if n["Labels"].get("market-type") == "spot"]
    assert 2 <= len(found) <= 3 and {a["Address"]["NodeID"] for a in found} == {*spot}
    lines = [line.split() for line in Path(config.calls).read_text().splitlines()]
    assert len({pid for stage, _, pid in lines if stage == "describe"}) >= 2
    assert len({pid for stage, _, pid in lines if stage == "choose"}) == 1
    plain = small_stages(config)
    run(Folder(url=str(tmp_path / "local")), plain, small_source(tmp_path, urls(50)))
    assert digests(tmp_path / "ray") == digests(tmp_path / "local")


def test_what_no_node_holds_ends_at_once(cluster: Any, tmp_path: Path, config: SmallConfig) -> None:
    """Four CPUs are there, but not on one node."""
    with pytest.raises(StageError) as told:
        build(tmp_path, config, Needs(cpus=4))
    assert str(told.value).startswith(
        "the cluster is too small: stage 'describe': an actor asks for 4 CPU; "
        "one node has at most 3 CPU, all 3 together 6 CPU; lower `needs`"
    )
    with pytest.raises(StageError, match=r"asks for 0\.25 GPU; one node has at most 0 GPU, all 3 together 0 GPU"):
        build(tmp_path, config, Needs(cpus=0, gpus=0.25))


@pytest.mark.timeout(240)
def test_a_stage_waits_for_another_job_and_says_so(
    cluster: Any, tmp_path: Path, config: SmallConfig, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    class Holder:
        def ready(self) -> bool:
            return True

    holder = ray.remote(num_cpus=0, resources={"captioner": 3})(Holder).remote()
    ray.get(holder.ready.remote())

    def say(line: str, flush: bool) -> None:
        quick.extend(line.splitlines())
        if "'describe'" in line:  # others may be slow to start, and are then told of as well
            ray.kill(holder)

    monkeypatch.setattr(ray_waiting, "print", say, raising=False)
    build(tmp_path, config, SPOT)
    told = next(line for line in quick if "'describe'" in line)
    assert told.startswith(
        "waiting to start: stage 'describe': an actor asks for 0.1 CPU, 1 captioner on a node with "
        "market-type=in(spot,free); one node has free at most"
    )
    assert told.endswith("0 captioner")


@pytest.mark.timeout(240)
def test_nodes_are_waited_for_and_used_when_they_come(
    cluster: Any, tmp_path: Path, config: SmallConfig, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    late = Needs(cpus=0.1, resources=("late=1",))
    with pytest.raises(
        StageError, match=r"no node has come in 0 min: stage 'describe': an actor asks for 0\.1 CPU, 1 late; "
    ):
        build(tmp_path, config, late, patience=0.5)
    end = time.monotonic() + 60
    while any(a["State"] != "DEAD" for stage in small_stages(config) for a in actors_of(stage.name)):
        assert time.monotonic() < end, "the build has given up and its actors are still there"
        time.sleep(0.2)
    there, earlier = {node["NodeID"] for node in ray.nodes()}, known()

    def say(line: str, flush: bool) -> None:
        quick.append(line)
        if "waiting for a node" in line and {node["NodeID"] for node in ray.nodes()} == there:
            add_node(cluster, num_cpus=1, resources={"late": 1})

    monkeypatch.setattr(ray_waiting, "print", say, raising=False)
    build(tmp_path, config, late, patience=120.0)
    found = actors_of("describe", earlier)
    assert found and not {actor["Address"]["NodeID"] for actor in found} & there


@pytest.mark.timeout(240)
def test_a_node_is_lost_in_the_middle_of_a_build(cluster: Any, tmp_path: Path, config: SmallConfig) -> None:
    """What it was at is done again elsewhere, while another's objects fill the store: the same bytes in the end."""
    import ray

    held = [ray.put(bytes(8 << 20)) for _ in range(25)]  # twice what the store of a node has
    labels = {"market-type": "spot"}
    lost = add_node(cluster, num_cpus=3, resources={"captioner": 3}, labels=labels)
    needs = replace(SPOT, resources=("captioner=2",), actors=(2, 2))  # one on each of the two
    building = ThreadPoolExecutor(1).submit(build, tmp_path, config, needs, rows=50)
    end = time.monotonic() + 120
    while len({line.split()[2] for line in _lines(config) if line.startswith("describe ")}) < 2:
        assert time.monotonic() < end and not building.done()
        time.sleep(0.1)
    cluster.remove_node(lost, allow_graceful=False)
    building.result(timeout=150)
    del held
    run(Folder(url=str(tmp_path / "local")), small_stages(config), small_source(tmp_path, urls(50)))
    assert digests(tmp_path / "ray") == digests(tmp_path / "local")


def _lines(config: SmallConfig) -> list[str]:
    path = Path(config.calls)
    return path.read_text().splitlines() if path.exists() else []


def test_a_head_that_is_silent_ends_the_build(monkeypatch: pytest.MonkeyPatch, config: SmallConfig) -> None:
    monkeypatch.setattr(ray_head, "LOOK", 0.0)
    monkeypatch.setattr(ray_head, "ANSWER", 0.05)
    waiting, answer = ray_waiting.Waiting(small_stages(config), 0.0), threading.Event()
    monkeypatch.setattr(waiting, "_find", lambda: str(answer.wait(60)))
    with pytest.raises(
        StageError, match=r"head has not answered for 0 s: what was published stays; start the head and"
    ):
        waiting.look()
    answer.set()


def test_a_board_that_does_not_answer_keeps_nobody_from_looking(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where it was lost with the head."""
    import ray

    class Silent:
        async def drain(self) -> None:
            await asyncio.sleep(600)

    def lost() -> None:
        raise HeadLost("seen")

    board, over = ray.remote(num_cpus=0)(Silent).remote(), threading.Event()
    over.set()
    with pytest.raises(HeadLost, match="seen"):
        follow(board, over, print, lost)
    monkeypatch.setattr(ray_head, "SILENT", 1.0)
    with pytest.raises(StageError, match="what the workers tell cannot be had for 1 s"):
        follow(board, over, print, int)
    ray.kill(board)


def test_a_cluster_that_cannot_be_joined_says_why(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    from ray.experimental import internal_kv

    with pytest.raises(StageError, match="cannot join the Ray cluster at ray://h:1: give the head's host:port"):
        join_cluster("ray://h:1")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(
        StageError, match=f"cannot join the Ray cluster at 127.0.0.1:{port}: nobody answers at .*refused"
    ):
        join_cluster(f"127.0.0.1:{port}")
    monkeypatch.setattr(ray_cluster, "_GREET", 1.0)
    with (
        socket.create_server(("", 0)) as silent,  # Ray takes 127.0.0.1 for any address of this machine
        pytest.raises(StageError, match="no answer of a Ray cluster"),
    ):
        join_cluster(f"127.0.0.1:{silent.getsockname()[1]}")
    monkeypatch.setattr(ray_cluster, "_GREET", 20.0)
    there = internal_kv._internal_kv_get(b"CLUSTER_METADATA", namespace=b"cluster")
    other = json.dumps({**json.loads(there), "ray_version": "2.1.0"}).encode()
    internal_kv._internal_kv_put(b"CLUSTER_METADATA", other, namespace=b"cluster")
    with pytest.raises(StageError, match=r"Version mismatch: The cluster was started with:\s+Ray: 2\.1\.0"):
        join_cluster(cluster.address)
    internal_kv._internal_kv_put(b"CLUSTER_METADATA", there, namespace=b"cluster")
    monkeypatch.setattr("ray._private.services.find_node_ids", lambda: {"another"})
    with pytest.raises(StageError, match="this machine is none of its nodes"):
        join_cluster(cluster.address)

    def refuse(**_: Any) -> None:
        raise ray.exceptions.AuthenticationError("InvalidAuthToken")

    monkeypatch.setattr(ray._raylet, "GcsClient", refuse)
    with pytest.raises(StageError, match="asks for a token and did not get the right one: set RAY_AUTH_MODE=token"):
        join_cluster(cluster.address)


def test_actors_are_called_as_their_stage(cluster: Any, config: SmallConfig) -> None:
    assert actor_class(small_stages(config)[2]) == "MapWorker(MapBatches(describe))"
