"""A recipe: a Python file that holds one complete, named configuration; and the command line over it.

`densebridge build recipe.py --recaption.batch-size 4` sets any field of any stage; a job's own options need no prefix.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pipeline.spelling import nearest
from pipeline.stage import Stage, check_stages
from pipeline.storage import Folder
from stages.pack import Pack
from stages.source import Source

from .places import SUBMITTED, check_places

if TYPE_CHECKING:
    from training.configuration import Sampler, TrainingConfig
    from training.evaluation.judge import Judge
    from training.language_models import LanguageModelConfig

RECIPES = Path(__file__).parent / "recipes"
Options = TypeVar("Options")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What `densebridge evaluate` does."""

    judge: Callable[[], Judge]
    """Makes the judge: it knows the prompts and scores the pictures."""
    base: LanguageModelConfig | None = None
    """The denoiser's own text encoder, for the arm without a connector. None where there is no such arm, as for SDXL, whose
    text is of two encoders at once."""
    arms: Mapping[str, str | None]
    """By name the training whose connector draws; None is the base as it is."""
    gains: Mapping[str, tuple[str, str]]
    """Paired comparisons by name: (arm, the arm it is held against)."""
    resolution: int
    """Side of the pictures in pixels."""
    steps: int = 50
    """Denoising steps. ELLA: 50."""
    guidance: float = 7.5
    """Classifier-free guidance scale."""
    sampler: Sampler = "auto"
    """How: DDIM or, for a flow, Euler's steps where it is "auto". ELLA: dpm++."""
    batch: int = 8
    """Pictures drawn at a time."""

    def check(self, trainings: Mapping[str, TrainingConfig]) -> None:
        """Raises ValueError where an arm asks for a training, or a gain for an arm, that is not there."""
        for arm, training in self.arms.items():
            if training is None and self.base is None:
                raise ValueError(f"arm {arm!r} draws with the base's own text encoder: name it as `base`")
            if training is not None and training not in trainings:
                raise ValueError(f"arm {arm!r} asks for training {training!r}: {nearest(training, trainings)}")
        for gain, pair in self.gains.items():
            for arm in pair:
                if arm not in self.arms:
                    raise ValueError(f"gain {gain!r} compares arm {arm!r}: {nearest(arm, self.arms)}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run's complete configuration."""

    name: str
    """Names the runs."""
    dataset: str
    """The dataset folder: any fsspec URL."""
    source: Source
    """The table of image-text pairs."""
    stages: tuple[Stage, ...]
    """What the build does, in order."""
    runs: str = "runs"
    """Local folder for training runs, one subfolder a training."""
    trainings: Mapping[str, TrainingConfig] = field(default_factory=dict)
    """Trainings by name; the first is the one meant where none is named."""
    evaluation: Evaluation | None = None
    """How the trainings are compared."""

    def __post_init__(self) -> None:
        check_stages(self.stages)
        views = [s.config.view for s in self.stages if isinstance(s, Pack)]
        for name, training in self.trainings.items():
            asked = [view for phase in training.phases for view in phase.views]
            if training.validation and training.validation.view:
                asked.append(training.validation.view)
            for view in asked:
                if views and view not in views:
                    near = nearest(view, views)
                    raise ValueError(f"training {name!r} asks for view {view!r}, which no stage packs: {near}")
        if self.evaluation:
            self.evaluation.check(self.trainings)

    @property
    def folder(self) -> Folder:
        """The dataset folder."""
        return Folder(url=self.dataset)

    def training(self, name: str | None) -> tuple[str, TrainingConfig]:
        """The training of this name, or the first; with its name."""
        if not self.trainings:
            raise ValueError(f"recipe {self.name!r} has no training: add one to `trainings`")
        chosen = name or next(iter(self.trainings))
        if chosen not in self.trainings:
            raise ValueError(f"recipe {self.name!r} has no training {chosen!r}: {nearest(chosen, self.trainings)}")
        return chosen, self.trainings[chosen]

    def run_folder(self, training: str) -> Path:
        """Where that training keeps its checkpoints, logs and release."""
        return Path(self.runs) / training


def load_recipe(name: str) -> Recipe:
    """The recipe in a Python file, or the one of this name in `jobs/recipes`. Errors are one line that says what to do."""
    path = Path(name)
    if not path.suffix:
        path = RECIPES / f"{name}.py"
    if not path.is_file():
        near = nearest(path.stem, sorted(p.stem for p in RECIPES.glob("*.py") if p.stem != "__init__"))
        raise FileNotFoundError(f"no recipe at {name}: give a Python file or a recipe's name ({near})")
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # it is the user's own code: whatever goes wrong in it is told in one line
        raise ValueError(f"recipe {path}: {_explained(error)}") from error
    recipe = getattr(module, "recipe", None)
    if not isinstance(recipe, Recipe):
        raise ValueError(f"recipe {path} does not define `recipe = Recipe(...)`")
    return recipe


def _explained(error: Exception) -> str:
    """The error in one line; where it is a setting that its class does not have, with the nearest that it has."""
    wrong = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if isinstance(error, TypeError) and wrong:
        owner, setting = wrong.groups()
        # Python names the class and does not give it; whoever could call it has its module loaded.
        for module in list(sys.modules.values()):
            kind = getattr(module, "__dict__", {}).get(owner)
            if isinstance(kind, type) and dataclasses.is_dataclass(kind):
                near = nearest(setting, [f.name for f in dataclasses.fields(kind)])
                return f"{owner} has no setting {setting!r}: {near}"
    return f"{type(error).__name__}: {error}"


def parse(
    argv: Sequence[str],
    job: str,
    options: type[Options],
    about: str,
    sets: Literal["stages", "trainings"] = "stages",
    words: str = "RECIPE",
) -> tuple[Recipe, Options]:
    """Recipe and options from the command line: `RECIPE`, the options, and `--<stage>.<field>` for every stage (or
    `--<training>.<field>` for every training). `words`: what stands without a flag, for the usage line. In a submitted
    job also checks that what it writes outlives it.
    """
    import tyro

    if not argv or argv[0] in ("-h", "--help"):
        print(
            f"usage: densebridge {job} {words} [OPTIONS]\n\n{about}\n\n`densebridge {job} RECIPE --help` lists the options."
        )
        raise SystemExit(0 if argv else 2)
    if argv[0].startswith("-"):
        raise ValueError(f"densebridge {job} needs the recipe first: densebridge {job} RECIPE {' '.join(argv)}")
    recipe = load_recipe(argv[0])
    if SUBMITTED in os.environ:
        check_places(job, recipe, argv[1:])
    flat: Any = Annotated[options, tyro.conf.arg(name="")]
    fields: list[Any] = [("options", flat, field(default_factory=options))]
    if sets == "stages":
        configs = {s.name: s.config for s in recipe.stages if dataclasses.fields(s.config)}
    else:
        configs = dict(recipe.trainings)
    # A union, such as the kinds of connector, stays what the recipe made it; on the command line its fields are set.
    kept: Any = tyro.conf.AvoidSubcommands
    fields += [(_field_name(name), kept[type(c)], field(default=c)) for name, c in configs.items()]
    made = dataclasses.make_dataclass("Settings", fields, frozen=True, kw_only=True)
    settings: Any = read_flags(made, argv[1:], f"densebridge {job} {argv[0]}", about)
    if sets == "trainings":
        changed = {name: getattr(settings, _field_name(name)) for name in configs}
        return dataclasses.replace(recipe, trainings=changed), settings.options
    stages = tuple(type(s)(getattr(settings, _field_name(s.name), s.config)) for s in recipe.stages)
    return dataclasses.replace(recipe, stages=stages), settings.options


def _field_name(name: str) -> str:
    """How a stage or training is called among the flags' fields; tyro makes dashes of underscores again."""
    return name.replace("-", "_")


def read_flags(kind: type[Options], args: Sequence[str], command: str, about: str) -> Options:
    """The dataclass from its flags. What is wrong with them is a ValueError in one line, where tyro prints a box."""
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=list(args), prog=command, description=about)
    except SystemExit as end:
        if not end.code:
            raise
    blocks: list[list[str]] = [[]]
    for line in re.sub(r"\x1b\[[0-9;]*m", "", said.getvalue()).splitlines()[1:]:  # the first is the box's title
        inside = line.strip("│╰╯ ")
        if inside and not inside.strip("─-"):
            blocks.append([])
        elif inside:
            blocks[-1].append(inside)
    blocks = [block for block in blocks if block] or [["the flags are not right"]]
    hints = [line.split()[0] for block in blocks[1:] for line in block if line.startswith("--")]
    unknown = re.search(r"^Unrecognized options:.*?(--[^\s,=]+)", " ".join(blocks[0]))
    meant = f" ({nearest(unknown[1], hints)})" if hints and unknown else ""
    raise ValueError(" ".join(blocks[0]) + meant + f": see {command} --help")


def quiet_libraries() -> None:
    """Keeps libraries from talking over the jobs' own output."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
