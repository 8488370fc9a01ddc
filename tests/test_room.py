"""Whether pools fit on nodes, and what is said where they do not."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.room import MEMORY, Node, amounts, no_room, shortage
from pipeline.stage import Needs, Stage
from tests.small_stages import Choose, Describe, Fetch, First, SmallConfig


def node(
    cpus: float, gpus: float = 0, memory: float = 64, labels: dict[str, str] | None = None, **custom: float
) -> Node:
    return Node(amounts={"CPU": cpus, "GPU": gpus, MEMORY: memory, **custom}, labels=labels or {})


def stage(kind: type[Stage] = Describe, **needs) -> Stage:
    return kind(replace(SmallConfig(), needs=Needs(**needs)))


def test_an_actor_must_fit_on_one_node() -> None:
    said = shortage([stage(cpus=3, gpus=0.5, memory_gb=9.5)], [node(2, 1, 8), node(2, 0, 16), node(2)])
    assert said == (
        "stage 'describe': an actor asks for 3 CPU, 0.5 GPU, 9.5 GiB memory; "
        "one node has at most 2 CPU, 1 GPU, 64 GiB memory, all 3 together 6 CPU, 1 GPU, 88 GiB memory"
    )
    assert not shortage([stage(cpus=2, gpus=0.5, memory_gb=8)], [node(2, 1, 8), node(2)])


def test_a_pool_asks_for_its_fewest_actors() -> None:
    assert "each of its 3 actors asks for 2 CPU" in shortage([stage(cpus=2, actors=(3, 9))], [node(3), node(3)])
    assert not shortage([stage(cpus=2, actors=(2, 9))], [node(3), node(3)])
    assert not shortage([stage(First, cpus=2, actors=(2, 9))], [node(2)])  # an ordered stage has one


def test_stages_are_added_up() -> None:
    pools = [stage(cpus=2), stage(Choose, cpus=1, actors=(2, 2))]
    assert (
        shortage(pools, [node(3)]) == "all stages at once ask for 4 CPU of 3: 'describe' 1 x 2 CPU, 'choose' 2 x 1 CPU"
    )
    assert not shortage(pools, [node(4)])


def test_tenths_add_up() -> None:
    assert not shortage([stage(cpus=0.1, actors=(10, 10))], [node(1)])
    assert not shortage([stage(cpus=0.7), stage(Choose, cpus=0.1, actors=(3, 3))], [node(1)])


def test_fractions_share_a_gpu_and_none_lies_across_two() -> None:
    assert node(64, gpus=2).actors(Needs(gpus=0.6)) == 2
    assert node(64, gpus=2).actors(Needs(gpus=0.25)) == 8
    assert node(64, gpus=2).actors(Needs(gpus=2)) == 1
    assert node(64, gpus=0.3).actors(Needs(gpus=0.25)) == 1  # what is free


def test_fractions_of_all_stages_are_laid_on_gpus() -> None:
    """Sums say that .75, .75 and .4 of a GPU fit on two; whoever comes last would wait for ever."""
    pools = [stage(Choose, gpus=0.4), stage(gpus=0.75, actors=(2, 4))]
    assert shortage(pools, [node(8, gpus=2)]) == (
        "all stages at once do not fit: of 2 GPU none has 0.4 left for an actor of 'choose': "
        "'choose' 1 x 1 CPU, 0.4 GPU, 'describe' 2 x 1 CPU, 0.75 GPU"
    )
    assert not shortage(pools, [node(8, gpus=2), node(8, gpus=1)])
    assert not shortage([stage(Choose, gpus=0.25, actors=(2, 2)), stage(gpus=0.75, actors=(2, 2))], [node(8, gpus=2)])
    halves = [stage(Choose, gpus=0.5), stage(gpus=2)]
    assert "2 left for an actor of 'describe'" not in shortage(halves, [node(8, gpus=1), node(8, gpus=2)])
    assert "none has 0.5 left for an actor of 'choose'" in shortage(
        [stage(Choose, gpus=0.5), stage(gpus=1, actors=(2, 2))], [node(8, gpus=2), node(0, gpus=1)]
    )


def test_who_may_lie_on_few_nodes_is_laid_first() -> None:
    spot = node(8, gpus=1, labels={"market-type": "spot"})
    pools = [stage(gpus=0.7), stage(Choose, gpus=0.5, labels=("market-type=spot",))]
    assert not shortage(pools, [spot, node(8, gpus=1)])


@given(st.lists(st.sampled_from([0.1, 0.25, 0.5, 0.75]), max_size=4))
def test_what_fits_on_one_gpu_is_not_refused(parts: list[float]) -> None:
    pools = [stage(kind, gpus=part) for kind, part in zip((First, Describe, Choose, Fetch), parts, strict=False)]
    assert bool(shortage(pools, [node(64, gpus=1)])) is (sum(parts) > 1 + 1e-6)


@pytest.mark.parametrize(
    ("wanted", "there", "absent"),
    [
        ("a", True, False),
        ("b", False, False),
        ("!a", False, True),
        ("in(b, a)", True, False),
        ("!in(a,b)", False, True),
    ],
)
def test_labels_select_as_rays_do(wanted: str, there: bool, absent: bool) -> None:
    needs = Needs(labels=(f"market-type={wanted}",))
    assert node(2, labels={"market-type": "a"}).allows(needs) is there
    assert node(2).allows(needs) is absent


def test_labels_that_no_node_has_are_named() -> None:
    one = stage(labels=("zone=x", "market-type=!spot"))
    assert shortage([one], [node(2), node(2)]) == (
        "stage 'describe': an actor asks for 1 CPU on a node with zone=x market-type=!spot; none of 2 nodes is one"
    )


def test_what_is_free_is_said_so() -> None:
    said = no_room(stage(resources=("captioner=1",)), [node(2, captioner=0), node(0.259)], "has free")
    assert said.endswith("one node has free at most 2 CPU, 0 captioner, all 2 together 2.25 CPU, 0 captioner")


@given(st.floats(0.01, 8), st.integers(0, 64), st.integers(1, 5))
def test_as_many_fit_as_are_held(cpus: float, cores: int, machines: int) -> None:
    room = node(cores).actors(Needs(cpus=cpus))
    held = [node(cores)] * machines
    assert bool(shortage([stage(cpus=cpus, actors=(room * machines + 1,) * 2)], held))
    if room:
        assert not shortage([stage(cpus=cpus, actors=(room * machines,) * 2)], held)


def test_amounts_are_what_is_taken() -> None:
    assert amounts(Needs(cpus=0, gpus=0.25, resources=("captioner=0.5",))) == {"GPU": 0.25, "captioner": 0.5}
