"""The views of a run, opened and checked: all but the shapes of buckets before any model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pyarrow.compute as pc

from pipeline.shards import View
from pipeline.storage import Folder

from .batches import batch_problem, check_images
from .configuration import Phase, TrainingConfig
from .denoisers import Denoiser, check_latents
from .flips import check_flips
from .language_models import check_view
from .view_order import BUCKETS, shapes_of


def open_views(config: TrainingConfig, dataset: Folder) -> list[list[View]]:
    """Each phase's views, every one checked to hold what the configuration wants, so that those of a mixture agree. Raises
    ValueError or FileNotFoundError.
    """
    phases = [[View.open(dataset, name) for name in phase.views] for phase in config.phases]
    for views, phase in zip(phases, config.phases, strict=True):
        for view in views:
            check_view(config.language_model, view.info)
            if config.beside:
                check_view(config.beside, view.info)
            check_images(view, phase.resolution)
            if config.flip:
                check_flips(view, config.language_model.tokenizer)
            check_latents(config.denoiser, phase, view.info)
    return phases


def check_shapes(denoiser: Denoiser, phases: Sequence[Sequence[View]]) -> None:
    """Raises ValueError where a view has a bucket that the denoiser's patches do not divide."""
    for view in (view for views in phases for view in views if view.info.shape == BUCKETS):
        for height, width in shapes_of(view):
            try:
                denoiser.latent_shape(height, width)
            except ValueError as error:
                raise ValueError(f"view {view.info.view!r} has a bucket that does not fit: {error}") from None


def open_held_out(config: TrainingConfig, dataset: Folder, phases: Sequence[Sequence[View]]) -> View | None:
    """The view that validation reads, checked as `open_views` does, and to share no sample with those of the phases."""
    settings = config.validation
    if settings is None or settings.view is None:
        return None
    if any(settings.view in phase.views for phase in config.phases):
        raise ValueError(f"validation.view {settings.view!r} is trained on: pack a view of samples that are held out")
    phase = Phase(
        view=settings.view,
        resolution=settings.resolution,
        samples=settings.batch,
        batch=settings.batch,
        micro_batch=settings.batch,
        latents=settings.latents,
    )
    ((held_out,),) = open_views(replace(config, phases=(phase,), crop="center", flip=False), dataset)
    keys = pc.unique(held_out.manifest.column("key"))
    for view in (view for views in phases for view in views):
        common = pc.sum(pc.is_in(view.manifest.column("key"), value_set=keys)).as_py()
        if common:
            raise ValueError(
                f"{common} of the {len(keys)} samples of validation.view {settings.view!r} are in view {view.info.view!r} too, "
                "which is trained on: part them by their keys, in the conditions of both views"
            )
    return held_out


def check_batches(config: TrainingConfig, processes: int) -> None:
    """Raises ValueError where a phase's global batch does not divide into the micro-batches of so many processes."""
    for phase in config.phases:
        micro_batch = phase.micro_batch_of(processes)
        if phase.batch % (processes * micro_batch):
            raise ValueError(batch_problem(phase.batch, processes, micro_batch))


def check_before(config: TrainingConfig, dataset: Folder, processes: int) -> None:
    """What needs no model: batches that divide, and the views. Raises as `open_views` does."""
    check_batches(config, processes)
    open_held_out(config, dataset, open_views(config, dataset))
