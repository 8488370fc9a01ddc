"""`densebridge generate`: pictures that say how they were drawn, its options, and mistakes in one line before models load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from jobs.cli import run
from jobs.generate import model_name, read_picture, read_prompts
from jobs.recipe import Recipe
from tests.training_fixtures import make_world, training_config
from training.bridge import Bridge
from training.checkpoints import State
from training.denoisers import DenoiserConfig
from training.ella import save_ella
from training.releases import read_release, write_release
from training.upsampling import UpsamplerConfig

RECIPE = """
from pathlib import Path
from jobs.recipe import Evaluation, Recipe
from stages.source import Source
from tests.training_fixtures import language_model_config, training_config
folder = Path(__file__).parent
recipe = Recipe(
    name="small", dataset=str(folder / "dataset"), source=Source(path="none.parquet"), stages=(),
    runs=str(folder / "runs"), trainings={"tsc": training_config(folder)},
    evaluation=Evaluation(
        judge=lambda: None, base=language_model_config(folder, pads="seen"), arms={}, gains={}, resolution=8, steps=2,
        guidance=3.0, batch=2,
    ),
)
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose training has a release."""
    from pipeline.fingerprint import plain

    root = make_world(tmp_path_factory.mktemp("world"))
    (root / "recipe.py").write_text(RECIPE)
    config = training_config(root)
    torch.manual_seed(0)
    facts = {
        "connector": plain(config.connector),
        "language_model": config.language_model.load().identity(),
        "denoiser": config.denoiser.load().identity(),
        "beside": None,
        "training": {},
        "phases": [],
    }
    write_release(root / "runs" / "tsc", facts, State(samples=1), Bridge(config.connector).state_dict(), None)
    return root / "recipe.py"


def draw(recipe: Path, out: Path, *flags: str) -> list[Image.Image]:
    with pytest.raises(SystemExit) as end:
        run("generate", [str(recipe), "--out", str(out), *flags])
    assert end.value.code == 0
    return [Image.open(path) for path in sorted(out.glob("*.png"))]


def complaint(recipe: Path, out: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """The one line that a mistake ends in."""
    with pytest.raises(SystemExit) as end:
        run("generate", [str(recipe), "--prompt", "red", "--out", str(out), *flags])
    said = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 1 and sum(line.startswith("densebridge: ") for line in said) == 1
    return said[-1]


def told(picture: Image.Image) -> dict[str, Any]:
    return json.loads(picture.text["densebridge"])  # type: ignore[attr-defined]


def test_a_picture_says_how_to_draw_it_again(recipe: Path, tmp_path: Path) -> None:
    flags = ("--negative", "small", "--sampler", "dpm++", "--guidance", "2", "--seed", "5", "--offload")
    first, second = draw(recipe, tmp_path / "a", "--prompt", "red round", "blue “square”", *flags)
    assert first.size == (16, 16) and not np.array_equal(np.asarray(first), np.asarray(second))
    assert told(second) == {
        "prompt": "blue “square”", "seed": 6, "recipe": "small", "training": "tsc", "release": None, "negative": "small",
        "resolution": 16, "steps": 2, "guidance": 2.0, "sampler": "dpm++",
    }  # fmt: skip
    known = told(second)
    again = [
        part
        for name in ("prompt", "seed", "negative", "sampler", "guidance", "steps")
        for part in (f"--{name}", str(known[name]))
    ]
    (redrawn,) = draw(recipe, tmp_path / "b", *again)
    assert np.abs(np.asarray(redrawn).astype(int) - np.asarray(second)).max() <= 1
    (base,) = draw(recipe, tmp_path / "c", "--prompt", "red round", "--base")
    assert told(base)["training"] is None and told(base)["sampler"] == "auto"
    assert base.size == (8, 8)  # the evaluation's, as no training is drawn with


def test_from_a_picture(recipe: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (10, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "start.png")
    assert np.array_equal(read_picture(tmp_path / "start.png", 10), pixels[:, 5:15])
    flags = ("--prompt", "red", "--init-image", str(tmp_path / "start.png"), "--steps", "10", "--strength")
    (near,), (far,) = (draw(recipe, tmp_path / strength, *flags, strength) for strength in ("0.1", "1"))
    assert told(near)["init_image"] == "start.png" and told(near)["strength"] == 0.1
    (plain,) = draw(recipe, tmp_path / "plain", "--prompt", "red", "--steps", "10")
    assert np.array_equal(np.asarray(far), np.asarray(plain)) and not np.array_equal(np.asarray(near), np.asarray(far))


def test_the_best_of_a_training_is_drawn_with_if_asked_for(recipe: Path, tmp_path: Path) -> None:
    run_folder = recipe.parent / "runs" / "tsc"
    facts = read_release(run_folder / "release")
    config = training_config(recipe.parent)
    torch.manual_seed(1)
    other = Bridge(config.connector)
    write_release(
        run_folder, facts, State(samples=1), other.state_dict(), None, name="best", validation={"metric": "clip_score"}
    )
    try:
        (last,) = draw(recipe, tmp_path / "last", "--prompt", "red")
        (best,) = draw(recipe, tmp_path / "best", "--prompt", "red", "--best")
        assert (told(last)["release"], told(best)["release"]) == (None, "best")
        assert np.asarray(last).tolist() != np.asarray(best).tolist()
    finally:
        shutil.rmtree(run_folder / "best")


def test_ellas_own_file_stands_in_for_a_release(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(recipe.parent / "runs" / "tsc" / "release" / "connector.safetensors")
    file = save_ella(weights, training_config(recipe.parent).connector, tmp_path / "ella.safetensors")
    (ours,) = draw(recipe, tmp_path / "a", "--prompt", "red round")
    (theirs,) = draw(recipe, tmp_path / "b", "--prompt", "red round", "--release", str(file))
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs)).max() <= 3  # float16 on disk
    assert (told(theirs)["release"], told(theirs)["training"]) == ("ella.safetensors", None)  # and not where it lay
    file.write_text("<html>")
    said = complaint(recipe, tmp_path / "c", capsys, "--release", str(file))
    assert "ella.safetensors is no safetensors file" in said


def test_a_trainings_flags_are_taken(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those with which it was trained: without them its release is another's."""
    with pytest.raises(SystemExit) as end:
        run("generate", [str(recipe), "--help"])
    assert end.value.code == 0 and "--tsc.language-model.layers" in capsys.readouterr().out
    said = complaint(recipe, tmp_path / "a", capsys, "--tsc.language-model.layers", "mean")
    assert "layers" in said and "'mean'" in said  # the release was trained on the last layer's
    drawn_with: list[Recipe] = []

    def evaluate(recipe: Recipe, seed: int, best: bool) -> None:
        drawn_with.append(recipe)
        raise ValueError("seen enough")

    monkeypatch.setattr("jobs.evaluate.evaluate", evaluate)
    with pytest.raises(SystemExit):
        run("evaluate", [str(recipe), "--tsc.language-model.layers", "mean", "--out", str(tmp_path / "e")])
    assert drawn_with[0].trainings["tsc"].language_model.layers == "mean"


def test_a_prompt_that_is_cut(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = "red round big left blue square small right green"
    draw(recipe, tmp_path / "a", "--prompt", "red", long)
    cuts = [line for line in capsys.readouterr().out.splitlines() if line.startswith("cut: ")]
    assert cuts == [f"cut: the last 2 tokens, beyond 8, of the prompt {long!r}"]  # nine words and the end


def test_prompts_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes("\ufeffred round\r\n\r\n blue \n".encode())
    assert read_prompts(tmp_path / "prompts.txt") == ["red round", "blue"]


def test_upsampled(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[UpsamplerConfig] = []

    class Expander:
        def to(self, device: str) -> Expander:
            return self

        def expand(self, prompts: list[str]) -> list[str]:
            return [f"{prompt} round big" if prompt == "red" else prompt for prompt in prompts]

    monkeypatch.setattr(UpsamplerConfig, "load", lambda self: asked.append(self) or Expander())
    first, second = draw(recipe, tmp_path / "a", "--prompt", "red", "blue", "--upsample", "owner/model@abc")
    assert (asked[0].model, asked[0].revision) == ("owner/model", "abc")
    assert told(first)["prompt"] == "red round big" and told(first)["upsampled_from"] == "red"
    assert told(first)["upsampled_by"] == "owner/model@abc" and model_name(str(tmp_path)) == tmp_path.name
    assert "upsampled_from" not in told(second) and "drawn: red round big\n" in capsys.readouterr().out
    dense, _ = draw(recipe, tmp_path / "b", "--prompt", "red round big", "blue")
    assert np.array_equal(np.asarray(first), np.asarray(dense))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--sampler", "plms"), "sampler"),
        (("--strength", "0"), "strength is a share of the steps"),
        (("--init-image", "nowhere.png"), "nowhere.png cannot be read as a picture"),
        (("--init-image", __file__), "cannot be read as a picture"),
        (("--steps", "2000"), "steps from 1 to 1000"),
        (("--resolution", "9"), "resolution 9 is not a multiple of 2"),
        (("--upsample", ""), "upsampler.model is empty"),
    ],
)
def test_mistakes(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], words: str
) -> None:
    assert words in complaint(recipe, tmp_path / "out", capsys, *flags) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--out", __file__), "is a file: name a folder with --out"),
        (("--release", "nowhere"), "nowhere is not there: name a release folder or ELLA's"),
        (("--release", "tests"), "tests holds no connector.json"),
        (("--release", "tests", "--base"), "leave out --base or --release"),
        (("--best", "--base"), "--best names the training's own release: leave it out, or --base or --release"),
        (("--best",), "best is not there: set a `validation` for training 'tsc' and run"),
        (("--guidance", "nan"), "guidance must be at least 0, and finite, got nan"),
        (("--guidance", "-1"), "guidance must be at least 0"),
    ],
)
def test_mistakes_show_before_models_load(
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    words: str,
) -> None:
    monkeypatch.setattr(UpsamplerConfig, "load", lambda _: pytest.fail("loaded a model first"))
    monkeypatch.setattr(DenoiserConfig, "load", lambda _: pytest.fail("loaded a model first"))
    assert words in complaint(recipe, tmp_path / "out", capsys, "--upsample", "owner/model", *flags)
