"""The arithmetic: linear in the rows, sums add up, no build is faster than its slowest stage or slower than one after another."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.costs.model import (
    Costs,
    Figure,
    Figures,
    PhaseCost,
    Prices,
    StageCost,
    Wall,
    cost_stages,
    critical_path,
    rows_given,
)
from jobs.costs.requests import Requests
from pipeline.stage import Needs, Stage
from tests.small_stages import Choose, Describe, Fetch, First, SmallConfig
from tests.test_requests import Cut

KINDS = (Fetch, First, Describe, Choose)
NAMES = [kind.name for kind in KINDS]
shares = st.floats(0.05, 1.0)
positive = st.floats(1e-3, 1e4)


def stated(value: float) -> Figure:
    return Figure(value=value, origin="stated")


@st.composite
def builds(draw: st.DrawFn) -> tuple[list[Stage], dict[str, Figures]]:
    """Stages with pools of any size, and all that is to be known of them."""
    stages, figures = [], {}
    for kind in KINDS:
        needs = Needs(
            cpus=draw(shares), gpus=draw(st.sampled_from((0.0, 0.5, 1.0))), actors=(1, draw(st.integers(1, 9)))
        )
        stages.append(kind(SmallConfig(needs=needs)))
        figures[kind.name] = Figures(
            keep=stated(draw(shares)), rate=stated(draw(positive)), size=stated(draw(positive))
        )
    return stages, figures


def costs_of(costs: Sequence[StageCost], wall: Wall) -> Costs:
    return Costs(rows=100, partitions=10, source=stated(3), stages=list(costs), phases=[], wall=wall)


@settings(deadline=None)  # a busy machine is no error
@given(builds(), st.integers(1, 50), st.integers(2, 7))
def test_twice_the_partitions_is_twice_the_work(
    build: tuple[list[Stage], dict[str, Figures]], partitions: int, times: int
) -> None:
    stages, figures = build
    one = cost_stages(stages, figures, rows=100 * partitions, partitions=partitions)
    more = cost_stages(stages, figures, rows=100 * partitions * times, partitions=partitions * times)
    for few, many in zip(one, more, strict=True):
        for name in ("rows", "seconds", "gpu_hours", "cpu_hours", "stored_bytes", "read_bytes"):
            assert getattr(many, name) == pytest.approx(times * getattr(few, name))
        assert many.requests.reads == pytest.approx(times * few.requests.reads)


@settings(deadline=None)  # a busy machine is no error
@given(builds(), st.integers(1, 50))
def test_sums_add_up(build: tuple[list[Stage], dict[str, Figures]], partitions: int) -> None:
    stages, figures = build
    found = cost_stages(stages, figures, rows=100, partitions=partitions)
    costs = costs_of(found, critical_path(found, partitions))
    prices = Prices(gpu_hour=2.0, cpu_hour=0.04, million_reads=0.4, million_writes=5.0, gb_read=0.09, gb_month=0.02)
    assert costs.gpu_hours == pytest.approx(sum(c.seconds * c.stage.needs.gpus / 3600 for c in found))
    assert costs.money(prices) == pytest.approx(
        2 * costs.gpu_hours
        + 0.04 * costs.cpu_hours
        + (0.4 * costs.requests.reads + 5 * costs.requests.writes) / 1e6
        + 0.09 * sum(c.read_bytes for c in found) / (1 << 30)
    )
    assert prices.month(costs.stored_bytes) == pytest.approx(
        0.02 * (300 + sum(c.rows * c.figures.keep.value * c.figures.size.value for c in found)) / (1 << 30)
    )


@settings(deadline=None)  # a busy machine is no error
@given(builds(), st.integers(1, 60))
def test_no_faster_than_the_slowest_and_no_slower_than_one_after_another(
    build: tuple[list[Stage], dict[str, Figures]], partitions: int
) -> None:
    stages, figures = build
    found = cost_stages(stages, figures, rows=1000, partitions=partitions)
    wall = critical_path(found, partitions)
    assert max(c.wall_seconds for c in found) <= wall.seconds * (1 + 1e-9)
    assert wall.seconds <= sum(c.seconds for c in found) * (1 + 1e-9)
    gpu_seconds = 3600 * sum(c.gpu_hours for c in found)
    one_gpu = critical_path(found, partitions, gpus=1.0)
    assert one_gpu.seconds == pytest.approx(max(wall.seconds, gpu_seconds))
    assert (one_gpu.limit == "GPUs") == (gpu_seconds > wall.seconds)


def test_rows_go_through_rules_and_what_a_stage_reads() -> None:
    """A stage that drops none does not stand between its neighbours, but those that read its columns do without its rows."""
    stages = [kind(SmallConfig()) for kind in KINDS]
    keep = dict(zip(NAMES, (0.8, 0.5, 0.9, 0.1), strict=True))
    assert rows_given(stages, 1000, keep) == pytest.approx([1000, 800, 400, 360])


def test_the_slowest_works_all_the_time_but_for_one_partition_on_its_way() -> None:
    needs = {"fetch": 1, "describe": 4}
    stages = [kind(SmallConfig(needs=Needs(actors=(1, needs[kind.name])))) for kind in (Fetch, Describe)]
    figures = {"fetch": Figures(keep=stated(1), rate=stated(50)), "describe": Figures(keep=stated(1), rate=stated(10))}
    found = cost_stages(stages, figures, rows=1000, partitions=10)
    # 10 partitions of 100 rows: 2 s each and 10 s each, of which four at a time are done, so three rounds
    assert critical_path(found, 10) == Wall(seconds=3 * 10 + 2, slowest="describe")
    ordered = [Fetch(SmallConfig()), First(SmallConfig(needs=Needs(actors=(1, 4))))]
    figures["first"] = figures["describe"]
    assert critical_path(cost_stages(ordered, figures, rows=1000, partitions=10), 10).seconds == 10 * 10 + 2


def test_a_stage_that_needs_all_rows_begins_when_those_before_have_ended() -> None:
    stages = [Fetch(SmallConfig()), Cut(SmallConfig())]
    figures = {name: Figures(keep=stated(1), rate=stated(10)) for name in ("fetch", "cut")}
    assert critical_path(cost_stages(stages, figures, rows=1000, partitions=10), 10).seconds == 200


def test_what_is_not_known_is_in_no_sum_and_what_has_no_price_neither() -> None:
    stages = [kind(SmallConfig(needs=Needs(gpus=float(kind is Describe)))) for kind in (Fetch, Describe)]
    figures = {"fetch": Figures(keep=stated(1), rate=stated(10), size=stated(1)), "describe": Figures(keep=stated(1))}
    found = cost_stages(stages, figures, rows=36_000, partitions=10)
    costs = costs_of(found, critical_path(found, 10))
    assert costs.without_rate == ["describe"] and costs.gpu_hours == 0 and costs.stored_bytes is None
    assert costs.money(Prices(gpu_hour=2.0)) is None and Prices(gpu_hour=2.0).of(found[0]) == 0
    assert costs.money(Prices(million_reads=1.0)) == pytest.approx(costs.requests.reads / 1e6)
    assert Prices(cpu_hour=3.0).of(found[0]) == pytest.approx(3.0)
    assert not Prices(gb_month=1.0).any_once and Prices().month(5.0) is None
    assert critical_path([], 3) == Wall(seconds=0.0, slowest="")


def test_phases_and_held_gpus() -> None:
    assert PhaseCost(name="tsc.0", samples=7200, rate=stated(2)).gpu_hours == 1
    assert PhaseCost(name="tsc.0", samples=7200, rate=None).gpu_hours is None
    stage = Describe(SmallConfig(needs=Needs(gpus=0.5, actors=(1, 4))))
    cost = StageCost(stage=stage, rows=10, figures=Figures(keep=stated(1)), requests=Requests(), read_bytes=None)
    assert math.isclose(costs_of([cost], Wall(seconds=7200, slowest="")).held_gpu_hours, 4.0)
    assert math.isclose(costs_of([cost], Wall(seconds=7200, slowest="", gpus=1.5)).held_gpu_hours, 3.0)
    assert critical_path([cost], 4, gpus=1.5).gpus == 1.5
