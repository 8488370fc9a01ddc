"""What a run says while it trains: `log.jsonl`, `ledger.jsonl` of bad samples, trackers and the console."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch

from .batches import BadSample, Batch
from .checkpoints import State
from .flops import Peak
from .phases import Phase
from .progress import RunProgress
from .trackers import Picture, TrackerName, Trackers

MEASURED = frozenset(("seconds", "samples_per_second", "waiting", "memory", "memory_reserved", "flops", "share"))
"""What a line of the log says of the machine: a run that is repeated has other values."""
GIB = 2**30


class Journal:
    """The run's records, by the main process; of skipped steps, every process writes the keys that it had."""

    def __init__(
        self,
        run: Path,
        *,
        main: bool,
        samples: int,
        phases: Sequence[Phase],
        trackers: Sequence[TrackerName] = (),
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """`samples` is where the run goes on: lines beyond it belong to a sitting that was cut off, and go. `facts` are its
        configuration and code, for the trackers.
        """
        self.run, self.main = run, main
        self._peak: float | None = None
        self._sample_flops: int | None = None
        self._bad_shards: set[str] = set()
        self._waited = 0.0
        self._progress = RunProgress(run.name, [phase.samples for phase in phases])
        self._trackers: Trackers | None = None
        if main:
            for name in ("log.jsonl", "ledger.jsonl", "skipped.jsonl"):
                cut(run / name, samples)
            self._trackers = Trackers(trackers, run, samples=samples, facts=dict(facts or {}), say=self.say)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.close()
        if self._trackers is not None:
            self._trackers.close()

    def measured(self, peak: Peak, processes: int) -> None:
        """Says how fast a device multiplies matrices; the log then tells which share of all processes' devices is used."""
        self._peak = peak.flops * processes
        self.say(f"peak {peak.measured}: {peak.flops / 1e12:.3g} TFLOP/s of {peak.device}")

    def counted(self, sample_flops: int | None) -> None:
        """FLOPs of a sample of the phase that begins; None where they are not known."""
        self._sample_flops = sample_flops

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches; the time that each was waited for counts as such on the next line of the log."""
        waiting = iter(batches)
        while True:
            began = time.monotonic()
            try:
                batch = next(waiting)
            except StopIteration:
                return
            self._waited += time.monotonic() - began
            yield batch

    def advance(self, state: State) -> None:
        """Moves the bars, where there are some, to where `state` is."""
        if self.main:
            self._progress.advance(state.samples, state.phase, state.position)

    def log(self, state: State, rate: float, grad_norm: float, norms: Mapping[str, Any] | None = None) -> float | None:
        """One line over the steps since the last one, which `state` held and now forgets; returns the mean loss.

        Its time is that of the steps, waiting for samples included; validation, checkpoints and this are not in it. `norms`
        are further numbers by name, or lists or dicts of them.
        """
        sums, weights = state.window or ([0.0], [0.0])
        seconds = max(state.window_seconds, 1e-9)
        speed, waiting = state.window_samples / seconds, min(1.0, self._waited / seconds)
        state.window, state.window_samples, state.window_seconds, self._waited = None, 0, 0.0, 0.0
        loss = sum(sums) / sum(weights) if sum(weights) else None
        if not self.main:
            return loss
        entry = {
            "step": state.step,
            "samples": state.samples,
            "phase": state.phase,
            "loss": loss,
            "bins": [one / weight if weight else None for one, weight in zip(sums, weights, strict=True)],
            "lr": rate,
            "grad_norm": finite(grad_norm),
            **(norms or {}),
            "skipped": state.skipped,
            "bad": state.bad,
            "seconds": round(state.seconds, 3),
            "samples_per_second": round(speed, 2),
            "waiting": round(waiting, 4),
            **_memory(),
            **self._share(speed),
        }
        _append(self.run / "log.jsonl", entry)
        self.scalars({name: value for name, value in entry.items() if name not in ("step", "samples")}, state.samples)
        self._progress.log(entry)
        return loss

    def _share(self, speed: float) -> dict[str, float]:
        """Achieved FLOP/s at so many samples a second, and which share they are of what all devices can do."""
        if self._peak is None or self._sample_flops is None:
            return {}
        achieved = speed * self._sample_flops
        return {"flops": achieved, "share": round(achieved / self._peak, 4)}

    def validation(self, entry: dict[str, Any], state: State, picture: Path | None, best: bool) -> None:
        """One line on a validation, in `validation.jsonl` and on the console; its scalars, and what was drawn."""
        _append(self.run / "validation.jsonl", entry)
        known = {name: value for name, value in entry.items() if name not in ("step", "samples", "phase", "pictures")}
        self.scalars({f"validation/{name}": value for name, value in known.items()}, state.samples)
        if picture is not None:
            self.picture("validation/pictures", picture, state.samples)
        figures = [
            f"{name.replace('_', ' ')} {entry[name]:.4f}" for name in ("held_out_loss", "clip_score") if entry.get(name)
        ]
        words = ", ".join([*figures, *([str(picture)] if picture else []), *(["the best so far"] if best else [])])
        self.say(f"validation at {state.samples:,} samples: {words}")

    def scalars(self, values: Mapping[str, Any], samples: int) -> None:
        """Numbers by name, to the trackers: a list or a dict becomes a curve an element, None is left out."""
        if self._trackers is not None:
            self._trackers.scalars(dict(_flat(values)), samples)

    def picture(self, name: str, picture: Picture, samples: int) -> None:
        """A picture (a file, or uint8 (H, W, 3)) to the trackers."""
        if self._trackers is not None:
            self._trackers.picture(name, picture, samples)

    def say(self, text: str) -> None:
        """One line on the console."""
        if self.main:
            self._progress.say(text)

    def bad(self, samples: int, phase: int, found: list[BadSample]) -> None:
        """Writes the bad samples of all processes in the step that ended at `samples` to the ledger; the first of each shard is
        said too.
        """
        for one in found if self.main else ():
            _append(self.run / "ledger.jsonl", {"samples": samples, "phase": phase, **asdict(one)})
            if one.shard not in self._bad_shards:
                self._bad_shards.add(one.shard)
                where = f"shard {one.shard}" if one.shard else "a batch"
                self.say(
                    f"{where}: sample {one.key!r} weighs nothing ({one.reason}); others like it go to ledger.jsonl only"
                )

    def skipped(
        self, samples: int, phase: int, start: int, batch: int, loss: float, grad_norm: float, keys: list[str]
    ) -> None:
        """Writes a step that was skipped to `skipped.jsonl`: its positions, and the keys of this process."""
        facts = {"samples": samples, "phase": phase, "positions": [start, start + batch], "keys": keys}
        _append(self.run / "skipped.jsonl", facts | {"loss": finite(loss), "grad_norm": finite(grad_norm)})


def finite(value: float) -> float | None:
    """The value, or None where JSON has no word for it."""
    return value if math.isfinite(value) else None


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat({f"{name}/{key}": one for key, one in value.items()})
        elif isinstance(value, list | tuple):
            yield from _flat({f"{name}/{number}": one for number, one in enumerate(value)})
        elif value is not None:
            yield name, value


def _memory() -> dict[str, float]:
    """GiB: on a GPU the most that tensors took so far and what torch reserved for them, else what the process takes now."""
    if torch.cuda.is_available():
        taken, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {"memory": round(taken / GIB, 3), "memory_reserved": round(reserved / GIB, 3)}
    return {"memory": round(psutil.Process().memory_info().rss / GIB, 3)}


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
