"""The Ray cluster of a build: joined where it runs, or started on this machine; and what its nodes have."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Sequence

from .room import MEMORY, Node
from .stage import Stage
from .time_limit import within
from .workers import StageError

GROWTH = 1200.0  # seconds that a build waits for the nodes of a cluster that may grow, where nothing else is said
_KNOCK, _GREET = 5.0, 15.0  # seconds: until a port answers, until all is known that joining takes


def join_cluster(address: str) -> None:
    """Connects to the cluster at `address`: its head's host:port, or `auto` for the one that this machine is a node of.

    Whether it can be joined is found out first and within a time limit: ray.init waits for minutes where nobody is, and
    names neither a wrong token nor a machine that is no node. Raises StageError in one line.
    """
    import ray

    _quiet()
    try:
        late = f"no answer of a Ray cluster within {_GREET:.0f} s: is its head up, and the port right?"
        where = within(_GREET, lambda: _greet(address), late)
        ray.init(address=where, log_to_driver=False, logging_level="ERROR")
    except (ValueError, RuntimeError, OSError, ray.exceptions.RayError) as error:
        raise StageError(f"cannot join the Ray cluster at {address}: {error}") from error


def _greet(address: str) -> str:
    """The head's host:port, where a cluster answers that this process fits."""
    import ray
    from ray._common.usage.usage_lib import get_cluster_metadata
    from ray._private import services
    from ray._private.utils import check_version_info

    where = services.canonicalize_bootstrap_address(address) if "://" not in address else address
    if not where or "://" in where:  # Ray Data's stream must be led from a node of the cluster
        raise ValueError("give the head's host:port (6379 as a rule), or start the job there: densebridge submit")
    host, _, port = where.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK).close()
    except OSError as error:
        raise ConnectionError(f"nobody answers at {where} ({error}): is its head up?") from None
    try:
        client = ray._raylet.GcsClient(address=where)
    except ray.exceptions.AuthenticationError:
        how = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the head's"
        raise PermissionError(f"it asks for a token and did not get the right one: {how}") from None
    check_version_info(get_cluster_metadata(client), "this machine")
    if not {node.hex() for node in client.get_all_node_info(timeout=_KNOCK)}.intersection(services.find_node_ids()):
        raise ConnectionError("this machine is none of its nodes: densebridge submit starts the job on one")
    return where


def start_cluster(stages: Sequence[Stage]) -> None:
    """Starts one on this machine, with slots enough for all stages at once.

    Ray's CPUs are slots, not cores: with fewer slots than the actors ask for, a stream would wait for ever.
    """
    import ray

    _quiet()
    slots = max(os.cpu_count() or 1, math.ceil(sum(s.needs.cpus * s.pool[0] for s in stages)) + 1)
    ray.init(
        address="local",
        num_cpus=slots,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=256 << 20,
        _node_ip_address="127.0.0.1",
    )


def _quiet() -> None:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")  # its hints would stand between the lines of our own progress


def nodes(*, free: bool = False) -> list[Node]:
    """The cluster's nodes and what each has; with `free`, what of it nobody uses."""
    import ray
    from ray._private.state import available_resources_per_node

    alive = [node for node in ray.nodes() if node["Alive"]]
    unused = available_resources_per_node() if free else {}
    found = [(unused.get(n["NodeID"], {}) if free else n["Resources"], n["Labels"]) for n in alive]
    return [Node(amounts=_counted(has), labels=labels) for has, labels in found]


def _counted(resources: dict[str, float]) -> dict[str, float]:
    return {**resources, MEMORY: resources.get("memory", 0.0) / (1 << 30)}


def may_grow() -> bool:
    """Whether more nodes may come: those of a cluster with an autoscaler belong to groups, which `ray start` knows nothing of."""
    import ray

    return any("ray.io/node-group" in node["Labels"] for node in ray.nodes() if node["Alive"])
