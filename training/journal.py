"""What a run says while it trains: `log.jsonl`, `ledger.jsonl` of bad samples, TensorBoard and the console."""

from __future__ import annotations

import json
import math
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .batches import BadSample
from .checkpoints import State


class Journal:
    """The run's records. Only the main process logs; every process writes its own bad samples."""

    def __init__(self, run: Path, *, main: bool, samples: int, total: int, phases: int) -> None:
        """`samples` is where the run goes on: lines beyond it belong to a sitting that was cut off, and go."""
        self.run, self.main, self.total, self.phases = run, main, total, phases
        self._board: Any = None
        if main:
            cut(run / "log.jsonl", samples)
            cut(run / "ledger.jsonl", samples)
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(run / "tensorboard", purge_step=samples + 1)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        if self._board is not None:
            self._board.close()

    def log(self, state: State, rate: float, grad_norm: float) -> float | None:
        """One line over the steps since the last one, which `state` held and now forgets; returns the mean loss."""
        sums, weights = state.window or ([0.0], [0.0])
        speed = state.window_samples / max(state.window_seconds, 1e-9)
        state.window, state.window_samples, state.window_seconds = None, 0, 0.0
        loss = sum(sums) / sum(weights) if sum(weights) else None
        entry = {
            "step": state.step,
            "samples": state.samples,
            "phase": state.phase,
            "loss": loss,
            "bins": [one / weight if weight else None for one, weight in zip(sums, weights, strict=True)],
            "lr": rate,
            "grad_norm": finite(grad_norm),
            "skipped": state.skipped,
            "bad": state.bad,
            "seconds": round(state.seconds, 3),
            "samples_per_second": round(speed, 2),
        }
        if self.main:
            _append(self.run / "log.jsonl", entry)
            self.scalars({name: value for name, value in entry.items() if name not in ("step", "samples")}, state)
            self.say(_line(entry, self.total, self.phases))
        return loss

    def validation(self, entry: dict[str, Any], state: State, picture: Path | None, best: bool) -> None:
        """One line on a validation, in `validation.jsonl` and on the console; its scalars, and what was drawn."""
        _append(self.run / "validation.jsonl", entry)
        known = {name: value for name, value in entry.items() if name not in ("step", "samples", "phase", "pictures")}
        self.scalars({f"validation/{name}": value for name, value in known.items()}, state)
        if picture is not None:
            self.picture("validation/pictures", picture, state)
        figures = [
            f"{name.replace('_', ' ')} {entry[name]:.4f}" for name in ("held_out_loss", "clip_score") if entry.get(name)
        ]
        words = ", ".join([*figures, *([str(picture)] if picture else []), *(["the best so far"] if best else [])])
        self.say(f"validation at {state.samples:,} samples: {words}")

    def scalars(self, values: dict[str, Any], state: State) -> None:
        """TensorBoard scalars over samples; a list becomes one curve an element, what is None is left out."""
        for name, value in values.items():
            numbered = enumerate(value) if isinstance(value, list) else [(None, value)]
            for number, one in numbered:
                if one is not None:
                    self._board.add_scalar(name if number is None else f"{name}/{number}", one, state.samples)

    def picture(self, name: str, path: Path, state: State) -> None:
        """A picture file, to TensorBoard."""
        with Image.open(path) as opened:
            self._board.add_image(name, np.asarray(opened), state.samples, dataformats="HWC")

    def say(self, text: str) -> None:
        """One line on the console."""
        if self.main:
            print(f"{self.run.name}: {text}", flush=True)

    def bad(self, samples: int, phase: int, found: list[BadSample]) -> None:
        """Writes bad samples of the step that ended at `samples` to the ledger."""
        for one in found:
            facts = {"samples": samples, "phase": phase, "position": one.position, "key": one.key, "reason": one.reason}
            _append(self.run / "ledger.jsonl", facts)

    def skipped(
        self, samples: int, phase: int, start: int, batch: int, loss: float, grad_norm: float, keys: list[str]
    ) -> None:
        """Writes a step that was skipped to `skipped.jsonl`: its positions, and the keys of this process."""
        facts = {"samples": samples, "phase": phase, "positions": [start, start + batch], "keys": keys}
        _append(self.run / "skipped.jsonl", facts | {"loss": finite(loss), "grad_norm": finite(grad_norm)})


def finite(value: float) -> float | None:
    """The value, or None where JSON has no word for it."""
    return value if math.isfinite(value) else None


def _line(entry: dict[str, Any], total: int, phases: int) -> str:
    left = (total - entry["samples"]) / max(entry["samples_per_second"], 1e-9)
    loss = "none" if entry["loss"] is None else f"{entry['loss']:.4f}"
    return (
        f"phase {entry['phase'] + 1}/{phases}  {entry['samples']:,}/{total:,} samples  loss {loss}  "
        f"rate {entry['lr']:.2e}  {entry['samples_per_second']:.1f}/s  {timedelta(seconds=round(left))} left"
    )


def _append(path: Path, value: dict[str, Any]) -> None:
    with path.open("a") as handle:
        handle.write(json.dumps(value, allow_nan=False) + "\n")  # one write: lines of several processes do not mix


def cut(path: Path, samples: int) -> None:
    """Drops the lines that were written after the checkpoint at `samples`, and half a line of a crash."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["samples"] <= samples:
                kept.append(line + "\n")
        except ValueError:
            continue
    aside = path.with_name(f".{path.name}.aside")
    aside.write_text("".join(kept))
    os.replace(aside, path)
