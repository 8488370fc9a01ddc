"""Who is said to wait, when, and when waiting ends a build. On a clock and a cluster that are told to the test."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline import ray_waiting
from pipeline.ray_head import HeadLost
from pipeline.ray_waiting import Waiting, actor_class
from pipeline.room import MEMORY, Node
from pipeline.stage import Needs, Stage
from pipeline.workers import StageError
from tests.small_stages import Choose, Describe, SmallConfig

STAGES: list[Stage] = [Describe(replace(SmallConfig(), needs=Needs(gpus=0.5))), Choose(SmallConfig())]
NO_GPU = Node(amounts={"CPU": 4.0, "GPU": 0.0, MEMORY: 8.0}, labels={})
GPU = Node(amounts={"CPU": 4.0, "GPU": 1.0, MEMORY: 8.0}, labels={})


class World:
    """Stands for Ray and the clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, patience: float) -> None:
        self.now, self.has, self.free = 1000.0, [GPU], [NO_GPU]
        self.states = {"describe": {"PENDING_CREATION"}, "choose": {"ALIVE", "PENDING_CREATION"}}
        monkeypatch.setattr(ray_waiting.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(ray_waiting, "nodes", lambda free=False: self.free if free else self.has)
        told = lambda _: {actor_class(s): self.states[s.name] for s in STAGES}  # noqa: E731
        monkeypatch.setattr(Waiting, "_states", told)
        self.waiting = Waiting(STAGES, patience)

    def lines(self, capsys: pytest.CaptureFixture[str], seconds: int) -> list[str]:
        for _ in range(seconds * 2):
            self.now += 0.5
            self.waiting.look()
        return capsys.readouterr().out.splitlines()


def test_a_stage_without_an_actor_is_told_of_every_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Within 30 s for the first time, and for as long as others have its GPU."""
    world = World(monkeypatch, 0.0)
    assert world.lines(capsys, 30) == [
        "waiting to start: stage 'describe': an actor asks for 1 CPU, 0.5 GPU; "
        "one node has free at most 4 CPU, 0 GPU, all 1 together 4 CPU, 0 GPU"
    ]
    assert len(world.lines(capsys, 600)) == 10
    world.states["describe"] = {"ALIVE"}
    assert not world.lines(capsys, 120)


def test_a_node_that_is_lost_has_two_minutes_to_come_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world = World(monkeypatch, ray_waiting.REPLACE)
    world.has, world.states["describe"] = [NO_GPU], {"RESTARTING"}
    assert len(world.lines(capsys, 120)) == 2
    with pytest.raises(StageError, match="no node has come in 2 min: stage 'describe': an actor asks for"):
        world.lines(capsys, 30)


def test_nodes_are_waited_for_as_long_as_it_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world = World(monkeypatch, 600.0)
    world.has = [NO_GPU]
    assert len(world.lines(capsys, 600)) == 10
    world.has, world.free = [NO_GPU, GPU], [NO_GPU, GPU]  # in time
    assert len(world.lines(capsys, 60)) == 1
    world.states["describe"] = {"ALIVE"}
    assert not world.lines(capsys, 120)
    world.has, world.states["describe"] = [NO_GPU], {"PENDING_CREATION"}
    world.lines(capsys, 590)  # anew
    with pytest.raises(StageError, match="no node has come in 10 min"):
        world.lines(capsys, 60)


def test_actors_that_do_not_start_where_there_is_room_are_told_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world = World(monkeypatch, 0.0)
    world.free = [GPU]
    assert not world.lines(capsys, 15)
    (line,) = world.lines(capsys, 30)
    assert line.startswith("waiting to start: stage 'describe'") and line.endswith(
        "; no one GPU may have that much free"
    )


def test_a_head_may_be_away_for_a_moment_but_not_for_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is asked of it may fail at once, and not only be late."""
    world = World(monkeypatch, 0.0)
    states = Waiting._states

    def away(_: object) -> None:
        raise RuntimeError("no answer")

    for _ in range(3):
        monkeypatch.setattr(Waiting, "_states", away)
        assert not world.lines(capsys, 29)
        monkeypatch.setattr(Waiting, "_states", states)
        world.lines(capsys, 11)
    monkeypatch.setattr(Waiting, "_states", away)
    with pytest.raises(HeadLost, match="head has not answered for 30 s"):
        world.lines(capsys, 45)
