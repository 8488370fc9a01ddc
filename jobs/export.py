"""Write a trained connector for others: a folder that diffusers loads, or ELLA's one file; with a model card."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .drawing import release_folder
from .model_card import model_card
from .recipe import Recipe, parse, quiet_libraries

if TYPE_CHECKING:
    from training.bridge import Weights
    from training.configuration import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of `densebridge export`."""

    training: str | None = None
    """Which of the recipe's trainings; None is the first."""
    release: Path | None = None
    """Another release folder than the recipe's."""
    to: Literal["diffusers", "ella"] = "diffusers"
    """`diffusers`: a folder for DiffusionPipeline.from_pretrained, and each LoRA by itself. `ella`: the file of ELLA and
    ComfyUI-ELLA, of a TSC with its timestep alone."""
    out: Path = Path("export")
    """A folder that is new or empty."""


def export(recipe: Recipe, options: ExportOptions) -> list[Path]:
    """Writes the folder and returns its files. The same release gives the same bytes.

    Raises FileNotFoundError, FileExistsError or ValueError in one line.
    """
    from training.checkpoints import publishing, read_release, release_parts
    from training.connectors import connector_config

    name, config = recipe.training(options.training)
    release = options.release or release_folder(recipe, name)
    facts = read_release(release)
    connector = connector_config(facts["connector"])
    if connector != config.connector:
        raise ValueError(
            f"{release} holds another connector than training {name!r}: name its training with --training, or its recipe"
        )
    if options.out.exists() and any(options.out.iterdir()):
        raise FileExistsError(f"{options.out} is not empty: name another folder with --out")
    parts = release_parts(release, facts)
    with publishing(options.out) as folder:
        if options.to == "ella":
            write_ella(config, parts, folder)
        else:
            write_diffusers(config, release, parts, folder)
        (folder / "README.md").write_text(model_card(recipe, name, release, options.to))
    return sorted(path for path in options.out.rglob("*") if path.is_file())


def write_ella(config: TrainingConfig, parts: dict[str, Weights], folder: Path) -> None:
    """ELLA's file. Raises ValueError where it cannot hold all that was trained."""
    from training.ella import check_ella, file_name, save_ella

    check_ella(config.connector)
    for part in parts:
        if part != "connector":
            raise ValueError(
                f"ELLA's file holds a connector alone, this release a {part} too: export to diffusers instead"
            )
    save_ella(parts["connector"], config.connector, folder / file_name(config.connector, config.language_model.model))


def write_diffusers(config: TrainingConfig, release: Path, parts: dict[str, Weights], folder: Path) -> None:
    """The folder of `training/diffusers_folder.py`, and what was trained inside the models in their libraries' own files."""
    from training.denoisers.files import NETWORKS, read_facts
    from training.diffusers_folder import save_pipeline
    from training.lora_files import save_denoiser_lora, save_language_model_lora

    denoiser, language_model = config.denoiser, config.language_model
    save_pipeline(folder, release=release, language_model=language_model, denoiser=denoiser, beside=config.beside)
    if denoiser.lora:
        network = next(name for name in NETWORKS if read_facts(denoiser, name, "config.json"))
        save_denoiser_lora(parts["denoiser_lora"], denoiser.lora, network, folder)
    if language_model.lora:
        save_language_model_lora(parts["language_model_lora"], language_model, folder / "language_model_lora")


def main(argv: list[str]) -> int:
    """Command line."""
    quiet_libraries()
    recipe, options = parse(argv, "export", ExportOptions, __doc__ or "", sets="trainings")
    for path in export(recipe, options):
        print(path)
    return 0


if __name__ == "__main__":
    from .cli import run

    run("export", sys.argv[1:])
