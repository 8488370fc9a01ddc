"""Write a trained connector for others: a folder that diffusers loads, or ELLA's one file; with a model card."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

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
    best: bool = False
    """Export the release that did best in the training's validation instead of the last."""
    to: Literal["diffusers", "ella"] = "diffusers"
    """`diffusers`: a folder for DiffusionPipeline.from_pretrained, and each LoRA by itself. `ella`: the file of ELLA and
    ComfyUI-ELLA, of a TSC with its timestep alone."""
    out: Path = Path("export")
    """A folder that is new or empty."""

    def __post_init__(self) -> None:
        if self.best and self.release:
            raise ValueError("--best names the training's own release: leave out --best or --release")


def export(recipe: Recipe, options: ExportOptions) -> list[Path]:
    """Writes the folder and returns its files. The same release gives the same bytes.

    Raises FileNotFoundError, FileExistsError or ValueError in one line.
    """
    from training.connectors import connector_config
    from training.releases import read_release, release_parts
    from training.whole_files import publishing

    name, config = recipe.training(options.training)
    release = options.release or release_folder(recipe, name, options.best)
    facts = read_release(release)
    if connector_config(facts["connector"]) != config.connector:
        raise ValueError(
            f"{release} holds another connector than training {name!r}: name its training with --training, or its recipe"
        )
    check_models(config, facts, f"{release} was trained otherwise than recipe {recipe.name!r} says")
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


def check_models(config: TrainingConfig, facts: dict[str, Any], what: str) -> None:
    """Raises ValueError where a release was trained with other models than these, as far as settings and files tell."""
    from training.checkpoints import check_same

    advice = "give the flags it was trained with"
    for name in ("language_model", "denoiser", "beside"):
        part, found = getattr(config, name), facts[name]
        if name == "denoiser":
            found = {key: found[key] for key in config.denoiser.identity()}  # the rest follows from the model
        check_same(found, part.identity() if part else None, what, advice, name)


def local_models(config: TrainingConfig) -> list[str]:
    """What the exported folder needs of this machine: the models that are no names on the hub."""
    from training.lora_files import is_on_hub

    parts = [part for part in (config.language_model, config.beside) if part]
    named = [config.denoiser.model, *(part.model for part in parts)]
    named += [part.tokenizer_model for part in parts if part.tokenizer_model]
    files = [config.denoiser.single_file] if config.denoiser.single_file else []
    return list(dict.fromkeys([*(model for model in named if not is_on_hub(model)), *files]))


def write_ella(config: TrainingConfig, parts: dict[str, Weights], folder: Path) -> None:
    """ELLA's file. Raises ValueError where it cannot hold all that was trained."""
    from training.ella import check_ella, check_features, file_name, save_ella

    check_ella(config.connector)
    check_features(config.language_model)
    if config.beside:
        raise ValueError(
            "ELLA's code has no place for the tokens of training.beside, which this connector was trained with: export to "
            "diffusers instead"
        )
    for part in parts:
        if part != "connector":
            raise ValueError(
                f"ELLA's file holds a connector alone, this release a {part} too: export to diffusers instead"
            )
    save_ella(parts["connector"], config.connector, folder / file_name(config.connector, config.language_model))


def write_diffusers(config: TrainingConfig, release: Path, parts: dict[str, Weights], folder: Path) -> None:
    """The folder of `training/diffusers_folder.py`, and what was trained inside the models in their libraries' own files."""
    from training.denoisers.files import NETWORKS, network_facts, read_facts
    from training.diffusers_folder import save_pipeline
    from training.lora_files import diffusers_loads, save_denoiser_lora, save_peft_lora

    denoiser, language_model = config.denoiser, config.language_model
    save_pipeline(folder, release=release, language_model=language_model, denoiser=denoiser, beside=config.beside)
    for name, model in (("denoiser_lora", denoiser), ("language_model_lora", language_model)):
        if model.lora is None:
            continue
        if name == "denoiser_lora" and diffusers_loads(network_facts(denoiser)["_class_name"]):
            network = next(place for place in NETWORKS if read_facts(denoiser, place, "config.json"))
            save_denoiser_lora(parts[name], model.lora, network, folder)
        else:
            save_peft_lora(parts[name], model.lora, folder / name, model=model.model, revision=model.revision)


def main(argv: list[str]) -> int:
    """Command line."""
    quiet_libraries()
    recipe, options = parse(argv, "export", ExportOptions, __doc__ or "", sets="trainings")
    for path in export(recipe, options):
        print(path)
    local = local_models(recipe.training(options.training)[1]) if options.to == "diffusers" else []
    if local:
        print(f"{options.out} loads on this machine alone, for it names what lies here: {', '.join(local)}")
    return 0


if __name__ == "__main__":
    from .cli import run

    run("export", sys.argv[1:])
