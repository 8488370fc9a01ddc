"""Draw pictures from prompts with a trained connector, or with the base alone."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.devices import device_of
from training.configuration import Sampler

from .drawing import check_release, load_drawer, release_folder
from .recipe import Evaluation, Recipe, parse, quiet_libraries

if TYPE_CHECKING:
    import numpy as np

    from pipeline.captions import CaptionTokenizer


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Options of `densebridge generate`."""

    prompt: tuple[str, ...] = ()
    """Prompts, each in quotes."""
    prompts: Path | None = None
    """A file with a prompt a line."""
    negative: str = ""
    """What guidance is against."""
    upsample: str | None = None
    """A decoder-only language model (folder, or name@revision on the hub) that makes dense prompts of short ones first."""
    training: str | None = None
    """Which of the recipe's trainings; None is the first."""
    base: bool = False
    """Draw with the base's own text encoder instead of a connector."""
    release: Path | None = None
    """Another release folder than the recipe's, or ELLA's own file (ella-sd1.5-tsc-t5xl.safetensors)."""
    best: bool = False
    """Draw with the release that did best in the training's validation instead of the last."""
    out: Path = Path("pictures")
    """Folder for the pictures, 0000.png and so on. Each holds its prompt, seed and settings, under "densebridge"."""
    seed: int = 0
    """Of the first picture's noise; the next has the next."""
    resolution: int | None = None
    """Side in pixels; None is that of the training's last phase, or of the recipe's evaluation for the base."""
    steps: int | None = None
    """Denoising steps; None is the recipe's."""
    guidance: float | None = None
    """Classifier-free guidance scale; None is the recipe's."""
    sampler: Sampler | None = None
    """How noise becomes a picture; None is the recipe's."""
    init_image: Path | None = None
    """A picture to start from; its middle is taken."""
    strength: float = 0.8
    """How much of that picture goes: the share of the steps that are taken, up to 1."""
    offload: bool = False
    """Keep the language model on the CPU but for when it reads."""

    def __post_init__(self) -> None:
        for name in ("resolution", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.guidance is not None and not 0 <= self.guidance < math.inf:
            raise ValueError(f"guidance must be at least 0, and finite, got {self.guidance}")
        if self.base and self.release:
            raise ValueError("the base draws without a connector: leave out --base or --release")
        if self.best and (self.base or self.release):
            raise ValueError("--best names the training's own release: leave it out, or --base or --release")
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength is a share of the steps, above 0 and at most 1, got {self.strength}")


def read_prompts(path: Path) -> list[str]:
    """The prompts in a file; empty lines are none."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file ({error}): give one with a prompt a line, in UTF-8") from None
    return [line.strip() for line in lines if line.strip()]


def read_picture(path: Path, side: int) -> np.ndarray:
    """The middle square of a picture file at that side: uint8 (side, side, 3)."""
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            upright = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a picture ({error}): give a JPEG or PNG") from None
    return np.asarray(ImageOps.fit(upright, (side, side), Image.Resampling.LANCZOS))


def expanded(model: str, prompts: list[str]) -> list[str]:
    """The prompts as that language model makes them dense; each is printed as it is drawn."""
    from training.upsampling import UpsamplerConfig

    name, _, revision = model.partition("@") if not Path(model).exists() else (model, "", "")
    found = UpsamplerConfig(model=name, revision=revision or None).load().to(device_of("auto")).expand(prompts)
    for prompt in found:
        print(f"drawn: {prompt}")
    return found


def model_name(model: str) -> str:
    """What a picture says of a model: its name on the hub with its revision, or its folder's name."""
    return Path(model).resolve().name if Path(model).exists() else model


def save_picture(picture: np.ndarray, path: Path, facts: dict[str, Any]) -> None:
    """Writes a PNG that says how it was drawn: JSON in its text chunk `densebridge`."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    chunks.add_itxt("densebridge", json.dumps(facts, ensure_ascii=False))
    Image.fromarray(picture).save(path, pnginfo=chunks)


def settings_of(recipe: Recipe, options: GenerateOptions) -> Evaluation:
    """Resolution, steps, guidance and sampler: the options', else the recipe's. A connector draws at the side at which its
    training ended.
    """
    if recipe.evaluation is None:
        raise ValueError(f"recipe {recipe.name!r} has no evaluation, which holds resolution, steps and guidance")
    changes = {name: getattr(options, name) for name in ("resolution", "steps", "guidance", "sampler")}
    given: Any = {name: value for name, value in changes.items() if value is not None}
    if not options.base:
        given = {"resolution": recipe.training(options.training)[1].phases[-1].resolution, **given}
    return dataclasses.replace(recipe.evaluation, **given)


def tell_cuts(tokenizer: CaptionTokenizer, prompts: list[str]) -> None:
    """Prints a line for each prompt of which the language model does not read all."""
    for prompt, cut in zip(prompts, tokenizer.tokens_cut(prompts), strict=True):
        if cut:
            print(f"cut: the last {cut} tokens, beyond {tokenizer.limit}, of the prompt {prompt!r}")


def told(recipe: Recipe, options: GenerateOptions, settings: Evaluation) -> dict[str, Any]:
    """What all pictures say of how they were drawn; of files and folders the names alone."""
    found: dict[str, Any] = {
        "recipe": recipe.name,
        "training": None if options.base or options.release else recipe.training(options.training)[0],
        "release": "best" if options.best else options.release and options.release.resolve().name,
        "negative": options.negative,
        **{key: getattr(settings, key) for key in ("resolution", "steps", "guidance", "sampler")},
    }
    if options.init_image:
        found |= {"init_image": options.init_image.name, "strength": options.strength}
    return found


def main(argv: list[str]) -> int:
    """Command line."""
    quiet_libraries()
    recipe, options = parse(argv, "generate", GenerateOptions, __doc__ or "", sets="trainings")
    asked = [*options.prompt, *(read_prompts(options.prompts) if options.prompts else [])]
    if not asked:
        raise ValueError("nothing to draw: give --prompt TEXT or --prompts FILE")
    if options.out.exists() and not options.out.is_dir():
        raise NotADirectoryError(f"{options.out} is a file: name a folder with --out")
    name, _ = recipe.training(options.training)
    settings = settings_of(recipe, options)
    image = read_picture(options.init_image, settings.resolution) if options.init_image else None
    release = None if options.base else options.release or release_folder(recipe, name, options.best)
    if release:  # before a language model is loaded
        check_release(release)
    prompts = asked if options.upsample is None else expanded(options.upsample, asked)
    drawer = load_drawer(recipe, None if options.base else name, release)
    tell_cuts(drawer.language_model.tokenizer, list(dict.fromkeys([*prompts, options.negative])))
    seeds = list(range(options.seed, options.seed + len(prompts)))
    drawn = drawer.draw(
        prompts,
        seeds,
        settings,
        negative=options.negative,
        image=image,
        strength=options.strength,
        offload=options.offload,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    common = told(recipe, options, settings)
    for spot, (picture, prompt, before, seed) in enumerate(zip(drawn, prompts, asked, seeds, strict=True)):
        own: dict[str, Any] = {"prompt": prompt, "seed": seed}
        if before != prompt:
            own |= {"upsampled_from": before, "upsampled_by": model_name(options.upsample or "")}
        save_picture(picture, options.out / f"{spot:04d}.png", {**own, **common})
    print(f"{len(prompts)} pictures in {options.out}")
    return 0


if __name__ == "__main__":
    from .cli import run

    run("generate", sys.argv[1:])
