"""Where a run's curves and pictures go beside its own files: TensorBoard, Weights & Biases, trackio.

A tracker takes numbers and pictures at a count of samples. None is needed to train: one that fails is told of once, and the
run goes on. wandb and trackio know a run by the id in its folder (`tracker_id`), so one that is resumed goes on there too.
"""

from __future__ import annotations

import importlib.util
import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
from PIL import Image

TrackerName = Literal["tensorboard", "wandb", "trackio"]
Picture = Path | np.ndarray
"""A file, or uint8 (H, W, 3)."""
PROJECT = "densebridge"

_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}


class Tracker(Protocol):
    """What each of them can do."""

    def scalars(self, values: Mapping[str, float], samples: int) -> None:
        """Numbers by name, one curve each."""

    def picture(self, name: str, picture: Picture, samples: int) -> None:
        """One picture."""

    def close(self) -> None:
        """Sends what is left."""


def check_tracker_names(names: tuple[TrackerName, ...]) -> None:
    """Raises ValueError for trackers that are not known, or named twice."""
    known = get_args(TrackerName)
    if isinstance(names, str) or set(names) - set(known) or len(set(names)) < len(names):
        raise ValueError(f"training.trackers is {names!r}: give a tuple of {', '.join(known)}, each at most once")


def check_trackers(names: Sequence[TrackerName]) -> None:
    """Raises ValueError in one line for a tracker whose package is not there."""
    for name in names:
        if importlib.util.find_spec(_PACKAGES[name]) is None:
            raise ValueError(
                f"training.trackers names {name!r}, which is not installed: pip install 'densebridge[{name}]', or leave it out"
            )


class Trackers:
    """A run's trackers as one. What fails in one of them is said once and stops nothing."""

    def __init__(
        self,
        names: Sequence[TrackerName],
        run: Path,
        *,
        samples: int,
        facts: dict[str, Any],
        say: Callable[[str], None],
    ) -> None:
        """`samples` is where the run goes on, `facts` its configuration and code, `say` writes a line on the console."""
        self._say = say
        self._failed: set[str] = set()
        self._open: dict[str, Tracker] = {}
        for name in names:
            self._guarded(name, partial(self._start, name, run, samples, facts))

    def scalars(self, values: Mapping[str, float], samples: int) -> None:
        """Numbers by name, to all."""
        for name, tracker in self._open.items():
            self._guarded(name, partial(tracker.scalars, values, samples))

    def picture(self, name: str, picture: Picture, samples: int) -> None:
        """One picture, to all."""
        for of, tracker in self._open.items():
            self._guarded(of, partial(tracker.picture, name, picture, samples))

    def close(self) -> None:
        """Closes all."""
        for name, tracker in self._open.items():
            self._guarded(name, tracker.close)

    def _start(self, name: TrackerName, run: Path, samples: int, facts: dict[str, Any]) -> None:
        self._open[name] = open_tracker(name, run, samples, facts)

    def _guarded(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # whatever a service or its client comes up with
            if name not in self._failed:
                self._failed.add(name)
                told = (str(error).strip().splitlines() or [""])[0]
                self._say(f"{name} failed ({type(error).__name__}: {told}), the run goes on: log.jsonl has all numbers")


def open_tracker(name: TrackerName, run: Path, samples: int, facts: dict[str, Any]) -> Tracker:
    """Starts a tracker, or goes on with it where the run has been before."""
    match name:
        case "tensorboard":
            return TensorBoard(run, samples, facts)
        case "wandb":
            return WeightsAndBiases(run, facts)
        case "trackio":
            return Trackio(run, facts)


class TensorBoard:
    """Event files in `tensorboard/` of the run folder; what was written beyond `samples` is hidden."""

    def __init__(self, run: Path, samples: int, facts: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(run / "tensorboard", purge_step=samples + 1)
        self._board.add_text("configuration", f"```json\n{json.dumps(facts, indent=1)}\n```", samples)

    def scalars(self, values: Mapping[str, float], samples: int) -> None:
        """One curve a name."""
        for name, value in values.items():
            self._board.add_scalar(name, value, samples)

    def picture(self, name: str, picture: Picture, samples: int) -> None:
        """One picture."""
        self._board.add_image(name, _pixels(picture), samples, dataformats="HWC")

    def close(self) -> None:
        """Writes what is left."""
        self._board.close()


class WeightsAndBiases:
    """A run at wandb, in project WANDB_PROJECT or `densebridge`; with WANDB_MODE=offline a folder in `wandb/`.

    wandb takes no step a second time: what a resumed run repeats is the same, and stays.
    """

    def __init__(self, run: Path, facts: dict[str, Any]) -> None:
        import wandb

        settings = wandb.Settings(console="off", disable_git=True, disable_code=True, quiet=True, finish_timeout=120)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            dir=str(run),
            id=_id_of(run),
            name=os.environ.get("WANDB_NAME", run.name),
            resume="allow",
            config=facts,
            settings=settings,
        )

    def scalars(self, values: Mapping[str, float], samples: int) -> None:
        """One curve a name, at step `samples`."""
        self._run.log(dict(values), step=samples)

    def picture(self, name: str, picture: Picture, samples: int) -> None:
        """One picture."""
        import wandb

        self._run.log({name: wandb.Image(_pixels(picture))}, step=samples)

    def close(self) -> None:
        """Sends what is left, for two minutes at most."""
        self._run.finish()


class Trackio:
    """A run of trackio, in a database of its own under TRACKIO_DIR."""

    def __init__(self, run: Path, facts: dict[str, Any]) -> None:
        import trackio

        self._run = trackio.init(
            project=PROJECT, name=f"{run.name}-{_id_of(run)}", config=facts, resume="allow", embed=False
        )

    def scalars(self, values: Mapping[str, float], samples: int) -> None:
        """One curve a name, at step `samples`."""
        self._run.log(dict(values), step=samples)

    def picture(self, name: str, picture: Picture, samples: int) -> None:
        """One picture."""
        import trackio

        self._run.log({name: trackio.Image(_pixels(picture))}, step=samples)

    def close(self) -> None:
        """Writes what is left."""
        self._run.finish()


def _pixels(picture: Picture) -> np.ndarray:
    """uint8 (H, W, 3)"""
    if isinstance(picture, np.ndarray):
        return picture
    with Image.open(picture) as opened:
        return np.asarray(opened.convert("RGB"))


def _id_of(run: Path) -> str:
    """By which services know the run: drawn once, and kept in its folder."""
    path = run / "tracker_id"
    if not path.is_file():
        path.write_text(uuid.uuid4().hex[:12])
    return path.read_text().strip()
