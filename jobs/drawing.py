"""Puts the parts of an arm together: a trained connector with its language model, or the base with its own text encoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.devices import device_of

from .recipe import Evaluation, Recipe

if TYPE_CHECKING:
    import numpy as np

    from training.bridge import Bridge
    from training.denoisers import Denoiser
    from training.language_models import LanguageModel


@dataclass(frozen=True, kw_only=True)
class Drawer:
    """What draws pictures for one arm."""

    language_model: LanguageModel
    bridge: Bridge | None
    denoiser: Denoiser
    beside: LanguageModel | None = None

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: Evaluation,
        *,
        negative: str = "",
        image: np.ndarray | None = None,
        strength: float = 0.8,
        offload: bool = False,
    ) -> np.ndarray:
        """One picture a prompt: uint8 (N, side, side, 3); the rest as `generate` has it."""
        from training.generation import generate

        return generate(
            language_model=self.language_model,
            bridge=self.bridge,
            denoiser=self.denoiser,
            beside=self.beside,
            prompts=prompts,
            resolution=settings.resolution,
            steps=settings.steps,
            guidance=settings.guidance,
            seeds=seeds,
            batch=settings.batch,
            sampler=settings.sampler,
            negative=negative,
            image=image,
            strength=strength,
            offload=offload,
        )


def release_folder(recipe: Recipe, training: str, best: bool = False) -> Path:
    """Where a training's release lies, its last or the one that did best in validation. Raises FileNotFoundError when there is
    none yet.
    """
    folder = recipe.run_folder(recipe.training(training)[0]) / ("best" if best else "release")
    if not folder.is_dir():
        needed = f"set a `validation` for training {training!r} and " if best else ""
        raise FileNotFoundError(
            f"{folder} is not there: {needed}run `densebridge train` for training {training!r} first"
        )
    return folder


def check_release(release: Path) -> None:
    """Raises FileNotFoundError or ValueError where that is neither a release folder nor a file of weights."""
    from training.releases import read_release

    if not release.exists():
        raise FileNotFoundError(f"{release} is not there: name a release folder or ELLA's .safetensors file")
    if release.suffix != ".safetensors":
        read_release(release)


def load_drawer(recipe: Recipe, training: str | None, release: Path | None = None) -> Drawer:
    """The drawer of a training's release (or of another release folder, or of ELLA's file of weights); without a training, the
    base as it is.
    """
    from training.ella import load_ella
    from training.parts import check_widths
    from training.releases import load_bridge

    _, config = recipe.training(training)
    folder = release or (release_folder(recipe, training) if training else None)  # before any model is loaded
    if training is None or folder is None:
        if recipe.evaluation is None or recipe.evaluation.base is None:
            raise ValueError(f"recipe {recipe.name!r} has no evaluation that names the base's own text encoder")
        bare = dataclasses.replace(config.denoiser, lora=None)  # the base is drawn as it was
        return Drawer(
            language_model=recipe.evaluation.base.load(), bridge=None, denoiser=bare.load().to(device_of("auto"))
        )
    denoiser, language_model = config.denoiser.load().to(device_of("auto")), config.language_model.load()
    beside = config.beside.load() if config.beside else None
    if folder.suffix == ".safetensors":
        check_widths(config.connector, language_model, denoiser, beside)
        bridge = load_ella(folder, config.connector)
    else:
        bridge = load_bridge(folder, language_model=language_model, denoiser=denoiser, beside=beside)
    return Drawer(language_model=language_model, bridge=bridge, denoiser=denoiser, beside=beside)
