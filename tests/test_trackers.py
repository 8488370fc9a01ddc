"""Trackers: the real TensorBoard, wandb and trackio, each without a network; one that fails stops nothing."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.training_fixtures import make_world, training_config
from training import trackers
from training.trackers import TensorBoard, Trackers, WeightsAndBiases, check_trackers

FACTS: dict[str, Any] = {"training": {"seed": 3}, "commit": "abc"}
PICTURE = np.full((4, 6, 3), 200, np.uint8)


def test_tensorboard_hides_what_a_cut_off_sitting_wrote(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = TensorBoard(tmp_path, 0, FACTS)
    first.scalars({"loss": 1.0, "bins/0": 2.0}, 12)
    first.scalars({"loss": 0.5}, 24)
    first.close()
    Image.fromarray(PICTURE).save(tmp_path / "grid.png")
    again = TensorBoard(tmp_path, 12, FACTS)  # resumed from 12
    again.scalars({"loss": 0.25}, 24)
    again.picture("grid", PICTURE, 24)
    again.picture("file", tmp_path / "grid.png", 24)
    again.close()
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(one.step, one.value) for one in found.Scalars("loss")] == [(12, 1.0), (24, 0.25)]
    assert [one.value for one in found.Scalars("bins/0")] == [2.0]
    for name in ("grid", "file"):
        (image,) = found.Images(name)
        assert (image.step, image.width, image.height) == (24, 6, 4)
    assert any("configuration" in tag for tag in found.Tags()["tensors"])


def test_wandb_offline_goes_on_with_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real client, writing to a local folder; both sittings have the id that the run folder holds."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = []
    for samples in (12, 24):
        tracker = WeightsAndBiases(tmp_path, FACTS)
        tracker.scalars({"loss": 1.0}, samples)
        tracker.picture("grid", PICTURE, samples)
        ids.append(tracker._run.id)
        assert tracker._run.config["commit"] == "abc" and tracker._run.step == samples
        tracker.close()
    assert ids[0] == ids[1] == (tmp_path / "tracker_id").read_text()
    written = sorted((tmp_path / "wandb").glob(f"offline-run-*/run-{ids[0]}.wandb"))
    assert written and all(path.stat().st_size for path in written)
    assert list((tmp_path / "wandb").glob("offline-run-*/files/media/images/grid_12_*.png"))


def test_trackio_goes_on_with_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # before it is imported
    trackio = pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    (tmp_path / "tsc").mkdir()
    for samples in (12, 24):
        tracker = trackers.Trackio(tmp_path / "tsc", FACTS)
        tracker.scalars({"loss": 1.0 / samples}, samples)
        tracker.picture("grid", PICTURE, samples)
        tracker.close()
    name = f"tsc-{(tmp_path / 'tsc' / 'tracker_id').read_text()}"
    (run,) = trackio.Api().runs("densebridge")
    assert run.name == name
    logs = SQLiteStorage.get_logs("densebridge", name)
    assert [(one["step"], one["loss"]) for one in logs if "loss" in one] == [(12, 1 / 12), (24, 1 / 24)]
    assert [one["step"] for one in logs if "grid" in one] == [12, 24] and run.config["commit"] == "abc"


class Broken:
    """A tracker whose network is down."""

    def scalars(self, values: object, samples: int) -> None:
        raise ConnectionError("no route\nto host")

    picture = scalars  # type: ignore[assignment]

    def close(self) -> None:
        raise TimeoutError


def test_a_tracker_that_fails_is_told_of_once_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, said = trackers.open_tracker, []
    monkeypatch.setattr(
        trackers, "open_tracker", lambda name, *rest: Broken() if name == "wandb" else opened(name, *rest)
    )
    both = Trackers(["wandb", "tensorboard"], tmp_path, samples=0, facts=FACTS, say=said.append)
    for samples in (12, 24):
        both.scalars({"loss": 1.0}, samples)
    both.close()
    assert said == ["wandb failed (ConnectionError: no route), the run goes on: log.jsonl has all numbers"]
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_tracker_that_does_not_start_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError("api_key not configured")

    said: list[str] = []
    monkeypatch.setattr(trackers, "open_tracker", refused)
    alone = Trackers(["wandb"], tmp_path, samples=0, facts=FACTS, say=said.append)
    alone.scalars({"loss": 1.0}, 12)
    alone.close()
    assert len(said) == 1 and "PermissionError: api_key not configured" in said[0]


def test_a_missing_package_is_said_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.storage import Folder
    from training.loop import train

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "trackio" else find(name))
    check_trackers(["tensorboard", "wandb"])
    config = training_config(make_world(tmp_path), trackers=("tensorboard", "trackio"))
    with pytest.raises(
        ValueError, match=r"names 'trackio', which is not installed: pip install 'densebridge\[trackio\]'"
    ):
        train(config, dataset=Folder(url=str(tmp_path / "dataset")), run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("names", [("mlflow",), ("wandb", "wandb"), "wandb"])
def test_settings_name_each_once(tmp_path: Path, names: Any) -> None:
    with pytest.raises(
        ValueError, match=r"trackers is .*: give a tuple of tensorboard, wandb, trackio, each at most once"
    ):
        training_config(tmp_path, trackers=names)
