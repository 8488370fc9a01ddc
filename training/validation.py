"""Looks at a run from time to time: held-out loss at fixed noise and timesteps, pictures of fixed prompts, their CLIP score.

Nothing of it reaches what is trained: no gradient, no global generator, and the weights are those from before, bit for bit.
What comes out does not depend on the number of processes, which share out samples and prompts; all of them do the same
number of forward passes, so that none waits for another's.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline.clip_models import PictureEncoder, TextEncoder
from pipeline.fingerprint import model_id, plain
from pipeline.shards import View
from pipeline.vaes import load_vae

from .batches import BatchConfig, Batches
from .checkpoints import State
from .configuration import TrainingConfig, ValidationConfig
from .denoisers.files import VAE
from .encoding import drawn_from, encode
from .fsdp import whole_bridge, whole_of
from .generation import generate
from .journal import Journal, cut
from .objective import BINS, binned
from .parts import Parts
from .processes import agreed
from .releases import write_release
from .samplers import scheduler_of
from .step import losses_of

BEST = "best"
"""Name of the release that did best, in the run folder."""
_PHASE = -1  # noise of its own: a run's phases are numbered from 0


class Validation:
    """What all validations of a sitting share. Models that training needs none of wait on the CPU for their turn."""

    def __init__(
        self,
        config: TrainingConfig,
        held_out: View | None,
        parts: Parts,
        run: Path,
        facts: dict[str, Any],
        state: State,
    ) -> None:
        """`facts` are those of `facts_of`; what was written after the last validation that `state` knows of goes.

        Raises ValueError or OSError in one line for what cannot work.
        """
        assert config.validation is not None
        self._settings: ValidationConfig = config.validation
        self._config, self._view, self._parts, self._run, self._facts = config, held_out, parts, run, facts
        settings, denoiser = self._settings, parts.denoiser
        denoiser.latent_shape(settings.resolution)
        scheduler_of(denoiser, settings.sampler)
        if settings.steps > denoiser.steps:
            raise ValueError(f"validation.steps is {settings.steps}: the denoiser has {denoiser.steps}")
        self._vae: Any = None
        self._judge: _Judge | None = None
        with drawn_from("validation/models", torch.device("cpu")):
            if denoiser.vae is None and (settings.prompts or (held_out and settings.latents == "off")):
                base = denoiser.config
                self._vae = load_vae(base.model, base.revision, VAE, base.dtype)
            if settings.clip is not None and parts.accelerator.is_main_process:
                self._judge = _Judge.load(settings.clip, settings.clip_revision, settings.prompts)
        self._how = self._measured_how()
        if parts.accelerator.is_main_process:
            self._cut_after(state.validated)

    def due(self, state: State) -> bool:
        """Whether the run has passed a multiple of `every` since the last validation, or begins, or ends."""
        every, last = self._settings.every, state.validated
        return last < 0 or state.samples // every > last // every or last < state.samples == self._config.samples

    def run(self, state: State, journal: Journal) -> None:
        """Measures and draws, on all processes; the main one writes down what was found, and keeps the best release."""
        began, settings, parts = time.monotonic(), self._settings, self._parts
        found: dict[str, Any] = {}
        pictures = None
        with self._looked_at() as looked_at, drawn_from("validation", parts.accelerator.device):
            if self._view is not None:
                found |= self._held_out(self._view, looked_at, first=state.validated < 0)
            if settings.prompts:
                pictures = self._draw(looked_at)
        is_first, state.validated = state.validated < 0, state.samples
        grid = None
        if pictures is not None and parts.accelerator.is_main_process:
            grid = self._save(pictures, state.samples)
            found["pictures"] = grid.relative_to(self._run).as_posix()
            found |= self._judge.score(pictures, parts.accelerator.device) if self._judge else {}
        main = parts.accelerator.is_main_process  # which alone reads the best one's figures, as it replaces them
        is_best = main and settings.metric is not None and self._is_best(found.get(settings.metric), is_first)
        self._keep_best(found, state, is_best)
        if main:
            about = {"step": state.step, "samples": state.samples, "phase": state.phase}
            seconds = round(time.monotonic() - began, 3)
            journal.validation({**about, **found, "seconds": seconds}, state, grid, is_best)

    def _keep_best(self, found: dict[str, Any], state: State, is_best: bool) -> None:
        """Releases the weights where the main process found that they do best; all of them bring what they hold of them."""
        settings, parts = self._settings, self._parts
        if not agreed(is_best):
            return
        trained, ema = whole_of(parts.bridge.state_dict()), whole_of(parts.ema or {})
        if parts.accelerator.is_main_process:
            record: dict[str, Any] = {name: found[name] for name in settings.measured}
            record |= {"metric": settings.metric, "how": self._how}
            write_release(self._run, self._facts, state, trained, ema, name=BEST, validation=record)

    def _cut_after(self, samples: int) -> None:
        """Removes what belongs to a sitting that was cut off."""
        cut(self._run / "validation.jsonl", samples)
        for folder in (self._run / "validation").glob("*"):
            if folder.name.isdigit() and int(folder.name) > samples:
                shutil.rmtree(folder)

    @contextmanager
    def _looked_at(self) -> Iterator[Parts]:
        """The parts, and inside what is trained is whole and in `eval`, with its averaged weights where there are any, and the
        VAE is there. No other process is waited for when it is called: there is no gradient to average.
        """
        bridge, denoiser, averaged = whole_bridge(self._parts.bridge), self._parts.denoiser, self._parts.ema
        keeps = averaged and bridge is self._parts.bridge  # else it is a copy, which goes
        own = {name: tensor.detach().clone() for name, tensor in bridge.state_dict().items()} if keeps else None
        bridge.eval()
        try:
            if averaged:
                bridge.load_state_dict(whole_of(averaged))
            if self._vae is not None:
                denoiser.vae = self._vae.to(denoiser.device)
            yield replace(self._parts, bridge=bridge, wrapped=bridge)
        finally:
            if own:
                bridge.load_state_dict(own)
            bridge.train()
            if self._vae is not None:
                denoiser.vae = None
                self._vae.to("cpu")

    @torch.no_grad()
    def _held_out(self, view: View, parts: Parts, first: bool) -> dict[str, Any]:
        """Mean loss over the held-out samples, over those of each timestep bin, and how many could not be read."""
        settings, accelerator = self._settings, parts.accelerator
        count = min(settings.samples, len(view))
        turns = math.ceil(count / (settings.batch * accelerator.num_processes))
        start = accelerator.process_index * turns * settings.batch
        tally = torch.zeros(2, BINS, dtype=torch.float64, device=accelerator.device)
        reason = ""
        with Batches([view], self._batch_config(), start) as batches:
            for _, batch in zip(range(turns), batches, strict=False):
                one = encode(parts, batch, "validation")
                asked = torch.tensor([position < count for position in batch.positions], device=accelerator.device)
                losses = losses_of(parts, one, "validation")
                tally += binned(losses, one.weights * asked, one.timesteps, parts.denoiser.steps)
                reason = reason or next((f": {bad.reason}" for bad in batch.bad), "")
        sums, weights = accelerator.reduce(tally, "sum").cpu().tolist()
        if first and not sum(weights):
            raise ValueError(f"none of the {count} samples of validation.view {view.info.view!r} can be used{reason}")
        return {
            "held_out_loss": _ratio(sum(sums), sum(weights)),
            "held_out_bins": [_ratio(one, weight) for one, weight in zip(sums, weights, strict=True)],
            "held_out_bad": count - round(sum(weights)),
        }

    def _batch_config(self) -> BatchConfig:
        """The held-out view as one process alone reads it: the same noise, timesteps and middles whoever does."""
        settings, parts, config = self._settings, self._parts, self._config
        return BatchConfig(
            seed=settings.seed,
            phase=_PHASE,
            resolution=settings.resolution,
            batch=settings.batch,
            micro_batch=settings.batch,
            latent_shape=parts.denoiser.latent_shape(settings.resolution),
            steps=parts.denoiser.steps,
            tokenizer=config.language_model.tokenizer,
            empty_ids=parts.empty_ids,
            beside=config.beside.tokenizer if config.beside else None,
            beside_empty_ids=parts.beside_empty_ids,
            caption_drop=0.0,
            drawn_latents=parts.denoiser.vae_facts.is_drawn,
            latents=settings.latents,
            threads=config.threads,
            ahead=1,
        )

    def _draw(self, parts: Parts) -> np.ndarray:
        """One picture a prompt, uint8 (N, side, side, 3): each process draws its share, the last ones some once more."""
        settings, accelerator, count = self._settings, parts.accelerator, len(self._settings.prompts)
        share = math.ceil(count / accelerator.num_processes)
        first = accelerator.process_index * share
        numbers = [min(number, count - 1) for number in range(first, first + share)]
        drawn = generate(
            language_model=parts.language_model,
            bridge=parts.bridge,
            denoiser=parts.denoiser,
            beside=parts.beside,
            prompts=[settings.prompts[number] for number in numbers],
            resolution=settings.resolution,
            steps=settings.steps,
            guidance=settings.guidance,
            seeds=[settings.seed + number for number in numbers],
            batch=settings.batch,
            sampler=settings.sampler,
        )
        return accelerator.gather(torch.from_numpy(drawn).to(accelerator.device)).cpu().numpy()[:count]

    def _save(self, pictures: np.ndarray, samples: int) -> Path:
        path = self._run / "validation" / f"{samples:09d}" / "grid.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(grid_of(pictures)).save(path)
        return path

    def _is_best(self, value: float | None, is_first: bool) -> bool:
        """Whether it beats what `best` in the run folder says of itself, where that was measured in the same way."""
        path = self._run / BEST / "connector.json"
        if value is None:
            return False
        former = None if is_first or not path.is_file() else json.loads(path.read_bytes()).get("validation")
        if former is None or former["metric"] != self._settings.metric or former["how"] != self._how:
            return True
        known = former[former["metric"]]
        return value < known if former["metric"] == "held_out_loss" else value > known

    def _measured_how(self) -> dict[str, Any]:
        """All that the metric depends on besides the weights: what was measured otherwise cannot be compared."""
        settings = self._settings
        if settings.metric == "clip_score":
            names, other = (
                ("prompts", "steps", "guidance", "sampler"),
                model_id(settings.clip or "", settings.clip_revision),
            )
        else:  # timesteps are spread evenly over a batch
            names, other = (
                ("view", "samples", "latents", "batch"),
                self._view.info.manifest_sha256 if self._view else "",
            )
        known = plain(settings)
        return {name: known[name] for name in ("resolution", "seed", *names)} | {"of": other}


@dataclass(frozen=True, kw_only=True)
class _Judge:
    """A CLIP that knows the prompts; on the CPU but for when it scores."""

    texts: np.ndarray
    """Unit vectors of the prompts (N, width)."""
    pictures: PictureEncoder

    @classmethod
    def load(cls, model: str, revision: str | None, prompts: tuple[str, ...]) -> _Judge:
        """Raises ValueError in one line where there is no such model."""
        try:
            texts = TextEncoder(model, revision, device="cpu")
            pictures = PictureEncoder(model, revision, device="cpu")
        except OSError as error:
            raise ValueError(f"validation.clip {model!r} cannot be loaded: {' '.join(str(error).split())}") from error
        vectors, tokens = texts.embed(prompts)
        if cut := int((tokens > texts.window).sum()):
            print(f"{model} reads {texts.window} tokens: {cut} of {len(prompts)} prompts are scored by their beginning")
        return cls(texts=vectors, pictures=pictures)

    def score(self, pictures: np.ndarray, device: torch.device) -> dict[str, Any]:
        """Cosine of each picture and its prompt, and their mean; pictures uint8 (N, side, side, 3)."""
        self.pictures.to(device)
        vectors = self.pictures.embed([Image.fromarray(picture) for picture in pictures])
        self.pictures.to("cpu")
        cosines = (vectors * self.texts).sum(1)
        return {"clip_score": float(cosines.mean()), "clip_scores": [round(float(one), 4) for one in cosines]}


def grid_of(pictures: np.ndarray) -> np.ndarray:
    """Pictures uint8 (N, side, side, 3), row by row in a grid as square as can be: uint8 (rows x side, columns x side, 3)."""
    count, side = len(pictures), pictures.shape[1]
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    cells = np.zeros((rows * columns, *pictures.shape[1:]), dtype=np.uint8)
    cells[:count] = pictures
    return cells.reshape(rows, columns, side, side, 3).swapaxes(1, 2).reshape(rows * side, columns * side, 3)


def _ratio(total: float, weight: float) -> float | None:
    """The mean, or None where there is none or JSON has no word for it."""
    return total / weight if weight and math.isfinite(total) else None
