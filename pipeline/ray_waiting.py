"""Which stages of a running build wait for a node: said every minute, and the build ended where none will come."""

from __future__ import annotations

import time
from collections.abc import Sequence

from .ray_cluster import nodes
from .room import no_room, shortage
from .stage import Stage
from .workers import StageError

LOOK, SAY = 10.0, 60.0  # seconds between two looks at the cluster, and between two lines about one stage
REPLACE = 120.0  # seconds that a node which was lost has to come back, in a cluster that is not known to grow


class Waiting:
    """Looks at the stages' actors. A stage waits while some of them are to be started and none works."""

    def __init__(self, stages: Sequence[Stage], patience: float) -> None:
        """`patience`: seconds that a stage may wait for a node that the cluster does not have."""
        self._stages = {actor_class(stage): stage for stage in stages}
        self._patience = max(patience, REPLACE)
        self._looked = time.monotonic()
        self._since: dict[str, float] = {}
        self._said: dict[str, float] = {}

    def look(self) -> None:
        """Prints a line for each stage that waits. Raises StageError where the cluster has lacked its node for too long."""
        import ray

        now = time.monotonic()
        if now - self._looked < LOOK:
            return
        self._looked = now
        try:
            states, there, free = self._states(), nodes(), nodes(free=True)
        except (
            ray.exceptions.RayError,
            RuntimeError,
        ):  # a head that is away for a moment; whether it stays so others tell
            return
        waiting = [name for name, found in states.items() if found and "ALIVE" not in found]
        self._since = {name: self._since.get(name, now) for name in waiting}
        short = shortage([self._stages[name] for name, found in states.items() if found], there)
        for name in waiting:
            waited, stage = now - self._since[name], self._stages[name]
            if short and waited > self._patience:
                raise StageError(f"stage {stage.name!r} has waited {waited / 60:.0f} min for a node: {short}")
            full = not any(node.actors(stage.needs) for node in free)
            if waited >= (LOOK if full else SAY) and now - self._said.get(name, -SAY) >= SAY:
                self._said[name] = now
                if full:
                    print(f"waiting for a node: {short or no_room(stage, free, 'has free')}", flush=True)
                else:
                    print(
                        f"stage {stage.name!r}: none of its actors has started in {waited:.0f} s, see Ray's logs",
                        flush=True,
                    )

    def _states(self) -> dict[str, set[str]]:
        """By class of actors: the states that those are in which are not dead."""
        import ray
        from ray._private.state import actors

        found: dict[str, set[str]] = {name: set() for name in self._stages}
        job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
        for actor in actors(job_id=job).values():
            if actor["ActorClassName"] in found and actor["State"] != "DEAD":
                found[actor["ActorClassName"]].add(actor["State"])
        return found


def actor_class(stage: Stage) -> str:
    """How Ray Data calls the actors of the pool whose class has the stage's name."""
    return f"MapWorker(MapBatches({stage.name}))"
