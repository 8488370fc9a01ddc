"""Which stages of a running build wait for a node: said every minute, and the build ended where none will come."""

from __future__ import annotations

import time
from collections.abc import Sequence

from .ray_cluster import nodes
from .ray_head import LOOK, HeadWatch
from .room import no_room, shortage
from .stage import Stage
from .workers import StageError

SAY = 60.0  # seconds between two lines about one stage
REPLACE = 120.0  # seconds that a node which was lost has to come back, where nothing else is said


class Waiting:
    """Looks at the stages' actors. A stage waits while some of them are to be started and none works."""

    def __init__(self, stages: Sequence[Stage], patience: float) -> None:
        """`patience`: seconds that a stage may wait for a node that the cluster does not have."""
        self._stages = {actor_class(stage): stage for stage in stages}
        self._patience = patience
        self._head = HeadWatch("what was published stays; start the head and build again")
        self._since: dict[str, float] = {}
        self._said: dict[str, float] = {}

    def look(self) -> None:
        """Prints a line for each stage that waits. Raises StageError where the cluster has lacked its node for too long,
        HeadLost where the head does not answer.
        """
        if lines := self._head.ask(self._find):
            print(lines, flush=True)

    def _find(self) -> str:
        """The lines to say now."""
        now, states = time.monotonic(), self._states()
        waiting = [name for name, found in states.items() if found and "ALIVE" not in found]
        self._since = {name: self._since.get(name, now) for name in waiting}
        if not waiting:
            return ""
        short = shortage([self._stages[name] for name, found in states.items() if found], nodes())
        lines = []
        for name in waiting:
            waited, stage = now - self._since[name], self._stages[name]
            if short and waited > self._patience:
                raise StageError(f"no node has come in {waited / 60:.0f} min: {short}")
            if waited >= 2 * LOOK and now - self._said.get(name, -SAY) >= SAY:
                self._said[name] = now
                lines.append(f"waiting for a node: {short}" if short else f"waiting to start: {_why(stage)}")
        return "\n".join(lines)

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


def _why(stage: Stage) -> str:
    """What the stage asks for and what is free. Only sums are known of a node's GPUs: free parts of several may be too small."""
    free = nodes(free=True)
    apart = stage.needs.gpus and any(node.actors(stage.needs) for node in free)
    return no_room(stage, free, "has free") + ("; no one GPU may have that much free" if apart else "")


def actor_class(stage: Stage) -> str:
    """How Ray Data calls the actors of the pool whose class has the stage's name."""
    return f"MapWorker(MapBatches({stage.name}))"
