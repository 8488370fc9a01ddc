"""Whether nodes have room for the stages' pools of actors, and the line that says so where they have not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .stage import Needs, Stage

MEMORY = "GiB memory"


@dataclass(frozen=True, kw_only=True)
class Node:
    """One node of a cluster, or what of it is free."""

    amounts: Mapping[str, float]
    """By resource: CPU, GPU, GiB memory, and those that the node was started with."""
    labels: Mapping[str, str]

    def allows(self, needs: Needs) -> bool:
        """Whether its labels are those asked for. A label that it does not have is none of those that are ruled out."""
        return all(_selects(wanted, self.labels.get(name)) for name, wanted in needs.selector.items())

    def actors(self, needs: Needs) -> int:
        """How many actors it has room for, by themselves. Several may share one GPU, but none lies across two."""
        if not self.allows(needs):
            return 0
        asked, gpus = amounts(needs), self.amounts.get("GPU", 0.0)
        fit = [int(self.amounts.get(name, 0.0) / amount + 1e-6) for name, amount in asked.items()]
        if 0 < needs.gpus < 1 and gpus == int(gpus):  # of what is free nobody says on how many GPUs it lies
            fit.append(int(gpus) * int(1 / needs.gpus + 1e-6))
        return min(fit, default=1 << 30)


def _selects(wanted: str, value: str | None) -> bool:
    """Ray's label selectors: `a`, `!a`, `in(a,b)`, `!in(a,b)`."""
    among = wanted.removeprefix("!")
    values = among[3:-1].replace(" ", "").split(",") if among.startswith("in(") else [among]
    return (value in values) is not wanted.startswith("!")


def amounts(needs: Needs) -> dict[str, float]:
    """What one actor takes, by resource, without those of which it takes nothing."""
    asked = {"CPU": needs.cpus, "GPU": needs.gpus, MEMORY: needs.memory_gb, **needs.custom}
    return {name: amount for name, amount in asked.items() if amount}


def shortage(stages: Sequence[Stage], nodes: Sequence[Node]) -> str:
    """What keeps the smallest pools of all stages from running at once, in one line; empty where nothing does.

    An actor lies on one node: what all nodes have together says little. Whether pools of several stages fit side by side is
    looked at in sums, and for GPUs by laying the actors on them.
    """
    for stage in stages:
        fewest = stage.pool[0]
        if sum(node.actors(stage.needs) for node in nodes) < fewest:
            return no_room(stage, nodes)
    asked = _sum({k: n * s.pool[0] for k, n in amounts(s.needs).items()} for s in stages)
    there = _sum(node.amounts for node in nodes)
    short = [f"{n:.4g} {k} of {there.get(k, 0.0):.4g}" for k, n in asked.items() if n > there.get(k, 0.0) + 1e-6]
    pools = ", ".join(f"{s.name!r} {s.pool[0]} x {_listed(amounts(s.needs))}" for s in stages)
    if short:
        return f"all stages at once ask for {', '.join(short)}: {pools}"
    if without := _without_gpu(stages, nodes):
        gpus = f"of {there['GPU']:.4g} GPU none has {without.needs.gpus:.4g} left for an actor of {without.name!r}"
        return f"all stages at once do not fit: {gpus}: {pools}"
    return ""


def _without_gpu(stages: Sequence[Stage], nodes: Sequence[Node]) -> Stage | None:
    """The stage one of whose fewest actors finds no GPU, if all are laid on them: first those that few nodes can hold, of these
    the largest, each where it first fits.
    """
    left = [[1.0] * int(node.amounts.get("GPU", 0.0)) for node in nodes]
    able = {stage.name: [bool(node.actors(stage.needs)) for node in nodes] for stage in stages}
    for stage in sorted(stages, key=lambda s: (sum(able[s.name]), -s.needs.gpus)):
        places = [gpus for gpus, fits in zip(left, able[stage.name], strict=True) if fits]
        if stage.needs.gpus and not all(_take(places, stage.needs.gpus) for _ in range(stage.pool[0])):
            return stage
    return None


def _take(places: Sequence[list[float]], gpus: float) -> bool:
    """Takes a part of one GPU, or whole ones of one node, where they first are free; whether they were."""
    each, count = min(gpus, 1.0), max(1, int(gpus))
    for place in places:
        free = [n for n, rest in enumerate(place) if rest >= each - 1e-6][:count]
        if len(free) == count:
            for n in free:
                place[n] -= each
            return True
    return False


def no_room(stage: Stage, nodes: Sequence[Node], has: str = "has") -> str:
    """Which stage, what an actor of it asks for, and the most that a node has (or `has free`)."""
    asked, fewest = amounts(stage.needs), stage.pool[0]
    who = "an actor asks" if fewest == 1 else f"each of its {fewest} actors asks"
    right = [node for node in nodes if node.allows(stage.needs)]
    on = f" on a node with {' '.join(stage.needs.labels)}" if stage.needs.labels else ""
    most = {name: max((node.amounts.get(name, 0.0) for node in right), default=0.0) for name in asked}
    total = _sum(node.amounts for node in right)
    there = f"one node {has} at most {_listed(most)}, all {len(right)} together {_listed({k: total.get(k, 0.0) for k in asked})}"
    if not right:
        there = f"none of {len(nodes)} nodes is one"
    return f"stage {stage.name!r}: {who} for {_listed(asked)}{on}; {there}"


def _sum(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for name, amount in part.items():
            total[name] = total.get(name, 0.0) + amount
    return total


def _listed(found: Mapping[str, float]) -> str:
    return ", ".join(f"{math.floor(amount * 100 + 1e-6) / 100:g} {name}" for name, amount in found.items())
