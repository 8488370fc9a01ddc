"""The Ray cluster of a build: joined where it runs, or started on this machine; and whether it is large enough."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

from .stage import Stage
from .workers import StageError


def join_cluster(address: str | None, stages: Sequence[Stage]) -> None:
    """Connects to the cluster at `address`, or starts one on this machine that is wide enough for all stages at once.

    Ray's CPUs are slots, not cores: with fewer slots than the actors ask for, a stream would wait for ever.
    """
    import ray

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")  # its hints would stand between the lines of our own progress
    if address:
        try:
            ray.init(address=address, log_to_driver=False)
        except (RuntimeError, OSError) as error:  # another version of Ray or Python there, or nobody
            raise StageError(f"cannot join the Ray cluster at {address}: {error}") from error
        short = shortage(stages, ray.cluster_resources())
        if short:  # an autoscaling cluster may grow, so this is no error
            print(f"the cluster is too small for all stages at once, and waits until it has grown: {short}")
        return
    slots = max(os.cpu_count() or 1, math.ceil(sum(s.needs.cpus * s.needs.actors[0] for s in stages)) + 1)
    ray.init(
        address="local",
        num_cpus=slots,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=256 << 20,
        _node_ip_address="127.0.0.1",
    )
    short = shortage(stages, ray.cluster_resources())
    if short:
        raise StageError(f"this machine cannot run all stages at once: {short}; lower `needs` or use a cluster")


def shortage(stages: Sequence[Stage], there: dict[str, float]) -> str:
    """What the smallest pools of all stages together ask for and the cluster does not have."""
    asked = {
        "CPU": sum(s.needs.cpus * s.needs.actors[0] for s in stages),
        "GPU": sum(s.needs.gpus * s.needs.actors[0] for s in stages),
        "GiB memory": sum(s.needs.memory_gb * s.needs.actors[0] for s in stages),
    }
    have = {**there, "GiB memory": there.get("memory", 0) / (1 << 30)}
    return ", ".join(f"{n:g} {k} of {have.get(k, 0):.4g}" for k, n in asked.items() if n > have.get(k, 0))
