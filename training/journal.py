"""What a run says while it trains: `log.jsonl`, `ledger.jsonl` of bad samples, TensorBoard and the console."""

from __future__ import annotations

import json
import math
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

from .batches import BadSample


class Journal:
    """The run's records. Only the main process logs; every process writes its own bad samples."""

    def __init__(self, run: Path, *, main: bool, samples: int, total: int, phases: int) -> None:
        """`samples` is where the run goes on: lines beyond it belong to a sitting that was cut off, and go."""
        self.run, self.main, self.total, self.phases = run, main, total, phases
        self.began = samples
        self._board: Any = None
        if main:
            _cut(run / "log.jsonl", samples)
            _cut(run / "ledger.jsonl", samples)
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(run / "tensorboard", purge_step=samples + 1)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        if self._board is not None:
            self._board.close()

    def log(self, entry: dict[str, Any]) -> None:
        """One log line: the numbers of `entry` by name; lists become one scalar an element."""
        if not self.main:
            return
        _append(self.run / "log.jsonl", entry)
        for name, value in entry.items():
            if name in ("step", "samples"):
                continue
            values = enumerate(value) if isinstance(value, list) else [(None, value)]
            for number, one in values:
                if one is not None:
                    tag = name if number is None else f"{name}/{number}"
                    self._board.add_scalar(tag, one, entry["samples"])
        self.say(_line(entry, self.total, self.phases))

    def say(self, text: str) -> None:
        """One line on the console."""
        if self.main:
            print(text, flush=True)

    def bad(self, samples: int, phase: int, found: list[BadSample]) -> None:
        """Writes bad samples of the step that ended at `samples` to the ledger."""
        for one in found:
            facts = {"samples": samples, "phase": phase, "position": one.position, "key": one.key, "reason": one.reason}
            _append(self.run / "ledger.jsonl", facts)

    def skipped(self, samples: int, phase: int, start: int, batch: int, loss: float, grad_norm: float) -> None:
        """Writes a step that was skipped, with the positions that made it, to `skipped.jsonl`."""
        facts = {"samples": samples, "phase": phase, "positions": [start, start + batch]}
        if self.main:
            _append(self.run / "skipped.jsonl", facts | {"loss": finite(loss), "grad_norm": finite(grad_norm)})


def finite(value: float) -> float | None:
    """The value, or None where JSON has no word for it."""
    return value if math.isfinite(value) else None


def _line(entry: dict[str, Any], total: int, phases: int) -> str:
    left = (total - entry["samples"]) / max(entry["samples_per_second"], 1e-9)
    loss = "none" if entry["loss"] is None else f"{entry['loss']:.4f}"
    return (
        f"phase {entry['phase'] + 1}/{phases}  {entry['samples']:,}/{total:,} samples  loss {loss}  rate {entry['lr']:.2e}  "
        f"{entry['samples_per_second']:.1f}/s  {timedelta(seconds=round(left))} left"
    )


def _append(path: Path, value: dict[str, Any]) -> None:
    with path.open("a") as handle:
        handle.write(json.dumps(value, allow_nan=False) + "\n")  # one write: lines of several processes do not mix


def _cut(path: Path, samples: int) -> None:
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
