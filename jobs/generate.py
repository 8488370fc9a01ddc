"""Draw pictures from prompts with a trained connector, or with the base alone."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

from .drawing import load_drawer
from .recipe import parse, quiet_libraries


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Options of `densebridge generate`."""

    prompt: tuple[str, ...] = ()
    """Prompts, each in quotes."""
    prompts: Path | None = None
    """A file with a prompt a line."""
    training: str | None = None
    """Which of the recipe's trainings; None is the first."""
    base: bool = False
    """Draw with the base's own text encoder instead of a connector."""
    release: Path | None = None
    """Another release folder than the recipe's."""
    out: Path = Path("pictures")
    """Folder for the pictures, 0000.png and so on."""
    seed: int = 0
    """Of the first picture's noise; the next has the next."""
    resolution: int | None = None
    """Side in pixels; None is the recipe's."""
    steps: int | None = None
    """Denoising steps; None is the recipe's."""
    guidance: float | None = None
    """Classifier-free guidance scale; None is the recipe's."""

    def __post_init__(self) -> None:
        for name in ("resolution", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


def read_prompts(path: Path) -> list[str]:
    """The prompts in a file; empty lines are none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file ({error}): give one with a prompt a line, in UTF-8") from None
    return [line.strip() for line in lines if line.strip()]


def main(argv: list[str]) -> int:
    """Command line."""
    quiet_libraries()
    recipe, options = parse(argv, "generate", GenerateOptions, __doc__ or "")
    prompts = [*options.prompt, *(read_prompts(options.prompts) if options.prompts else [])]
    if not prompts:
        raise ValueError("nothing to draw: give --prompt TEXT or --prompts FILE")
    name, _ = recipe.training(options.training)
    drawer = load_drawer(recipe, None if options.base else name, options.release)
    if recipe.evaluation is None:
        raise ValueError(f"recipe {recipe.name!r} has no evaluation, which holds resolution, steps and guidance")
    settings = dataclasses.replace(
        recipe.evaluation,
        resolution=recipe.evaluation.resolution if options.resolution is None else options.resolution,
        steps=recipe.evaluation.steps if options.steps is None else options.steps,
        guidance=recipe.evaluation.guidance if options.guidance is None else options.guidance,
    )
    from PIL import Image

    options.out.mkdir(parents=True, exist_ok=True)
    seeds = range(options.seed, options.seed + len(prompts))
    for spot, picture in enumerate(drawer.draw(prompts, list(seeds), settings)):
        Image.fromarray(picture).save(options.out / f"{spot:04d}.png")
    print(f"{len(prompts)} pictures in {options.out}")
    return 0


if __name__ == "__main__":
    from .cli import run

    run("generate", sys.argv[1:])
