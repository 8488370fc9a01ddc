"""The scaling benchmark reads its figures off the notes rightly, and its stages build what the cost model says they do."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.scaling import KEEP, RATES, Sizes, Work, build, figures_of, is_good, make_stages, predict, read_notes

SIZES = Sizes(partitions=4, size=5000, shrink=100)


def works(*spans: tuple[float, float]) -> list[Work]:
    return [Work(began=began, ended=ended, rows=45) for began, ended in spans]


def test_sizes_and_batches_shrink_together(tmp_path: Path) -> None:
    stages = {stage.name: stage for stage in make_stages(SIZES, tmp_path, nodes=3)}
    assert SIZES.rows == 50 and {name: s.batch_size for name, s in stages.items()} == {
        "download": 2,
        "caption": 5,
        "score": 2,
    }
    assert stages["caption"].needs.actors == (6, 6) and stages["download"].needs.actors == (3, 3)


def test_every_stage_is_predicted_its_rows_by_its_rate(tmp_path: Path) -> None:
    costs, wall = predict(make_stages(SIZES, tmp_path, nodes=1), SIZES)
    given = {"download": 200, "caption": 200 * KEEP["download"], "score": 200 * KEEP["download"]}
    assert {c.stage.name: c.seconds for c in costs} == pytest.approx({n: r / RATES[n] for n, r in given.items()})
    # 4 partitions of 45 captions by two actors, and one partition on its way through the others
    assert wall.slowest == "caption" and wall.seconds == pytest.approx(2 * 4.5 + 50 / 50 + 45 / 900)


def test_gaps_stay_at_the_real_size_and_all_else_grows(tmp_path: Path) -> None:
    costs, wall = predict(make_stages(SIZES, tmp_path, nodes=1), SIZES)
    notes = {
        "download": {"1": works((0.0, 1.0), (1.0, 2.0), (2.0, 3.0), (3.0, 4.0))},
        "caption": {"2": works((1.2, 5.7), (5.8, 10.3)), "3": works((2.2, 6.7), (6.8, 11.3))},
        "score": {"4": works((6.0, 6.05), (7.0, 7.05), (10.5, 10.55), (11.5, 11.55))},
    }
    found = figures_of(notes, SIZES, costs=costs, predicted=wall, engine_seconds=0.03)
    assert found["wall_seconds"] == pytest.approx(11.55) and found["slowest_own_seconds"] == pytest.approx(9.0)
    assert found["gap_ms"] == pytest.approx(100) and found["ray_ms"] == pytest.approx(70)
    # One download at a time: the two would have begun after 1 and 2 seconds.
    assert found["fill_ms"] == pytest.approx(200)
    at_size = 100 * (11.55 - 0.4) + 0.4
    assert found["overhead_share_here"] == pytest.approx(0.4 / 11.55)
    assert found["overhead_share_at_size"] == pytest.approx(0.4 / at_size)
    assert found["over_slowest_here"] == pytest.approx(11.55 / 9 - 1)
    assert found["over_slowest_at_size"] == pytest.approx(at_size / 900 - 1)
    assert found["off_prediction_at_size"] == pytest.approx(at_size / (100 * wall.seconds) - 1)
    assert found["caption_worker_seconds"] == pytest.approx(18)
    assert found["caption_predicted_seconds"] == pytest.approx(18)


def test_what_is_too_slow_or_not_as_predicted_ends_with_1() -> None:
    good = {"overhead_share_at_size": 0.01, "over_slowest_at_size": 0.05, "off_prediction_at_size": -0.05}
    assert is_good(good)
    for change in ({"overhead_share_at_size": 0.04}, {"over_slowest_at_size": 0.2}, {"off_prediction_at_size": -0.2}):
        assert not is_good({**good, **change})


@pytest.mark.parametrize("asleep", [True, False])
def test_the_stages_build_and_note_what_they_did(tmp_path: Path, asleep: bool) -> None:
    sizes, notes = Sizes(partitions=2, size=500, shrink=100), tmp_path / "notes"
    notes.mkdir()
    build(make_stages(sizes, notes, nodes=1, asleep=asleep), sizes, tmp_path, "local")
    told = {name: [w for works in actors.values() for w in works] for name, actors in read_notes(notes).items()}
    rows = {name: sum(work.rows for work in found) for name, found in told.items()}
    assert rows["download"] == 10 and rows["caption"] == rows["score"] <= 10
    if asleep:  # never shorter than said
        assert all(w.ended - w.began >= 0.999 * w.rows / RATES[n] for n, found in told.items() for w in found)
