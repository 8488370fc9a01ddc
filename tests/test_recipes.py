"""The recipes that go by name: they load without a network, their stages fit together, and their numbers are the paper's."""

from __future__ import annotations

import dataclasses
import json
import socket
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import plan as plan_job
from jobs.build import check_conditions
from jobs.recipe import RECIPES, Recipe, load_recipe
from pipeline.plan import make_plan
from pipeline.stage import check_stages
from pipeline.storage import Folder
from stages.conditions import select_rows
from stages.pack import Pack, PackConfig
from training.connectors import TSCConfig, build_connector

NAMES = sorted(p.stem for p in RECIPES.glob("*.py") if p.stem != "__init__")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("asked the network"))
    for name in ("DATASET", "RUNS", "SOURCE"):
        monkeypatch.setenv(f"DENSEBRIDGE_{name}", str(tmp_path / name.lower()))


@pytest.fixture
def ella() -> Recipe:
    return load_recipe("ella_sd15")


@pytest.mark.parametrize("name", NAMES)
def test_recipes_are_sound(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    check_stages(recipe.stages)
    check_conditions(recipe.stages)
    assert make_plan(Folder(url=str(tmp_path / "none")), recipe.stages, []).is_empty
    views = {s.config.view: s.config for s in recipe.stages if isinstance(s, Pack)}
    for training in recipe.trainings.values():
        for phase in training.phases:
            assert phase.resolution <= views[phase.view].resolution
            tokens = {t.name: t for t in views[phase.view].tokenizers}[training.language_model.tokenizer]
            assert tokens.max_length == training.language_model.max_length
            assert (tokens.model, tokens.revision) == (training.language_model.model, training.language_model.revision)


def test_a_view_of_one_name_is_one_view_in_all_recipes() -> None:
    """They may share a dataset folder, where building one must not replace another's views."""
    found: dict[str, tuple[str, PackConfig]] = {}
    for name in NAMES:
        for pack in (s for s in load_recipe(name).stages if isinstance(s, Pack)):
            first, settings = found.setdefault(pack.config.view, (name, pack.config))
            assert pack.config == settings, f"view {pack.config.view} of {name} is not that of {first}"
    assert {"512", "held-out", "1024"} <= found.keys()


def test_a_plan_of_nothing_is_shown(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(
        pa.table({"URL": pa.array([], pa.string()), "TEXT": pa.array([], pa.string())}), tmp_path / "source.parquet"
    )
    monkeypatch.setenv("DENSEBRIDGE_SOURCE", str(tmp_path / "source.parquet"))
    assert plan_job.main(["ella_sd15", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert list(shown) == [
        "download", "deduplicate", "embed", "recaption", "score",
        "pretokenize_t5", "clip_filter", "pack_512", "pack_held-out", "pack_1024",
    ]  # fmt: skip
    assert all(not any(stage.values()) for stage in shown.values())


def test_ella_has_the_published_numbers(ella: Recipe) -> None:
    name, training = ella.training(None)
    assert name == "tsc"
    state = build_connector(training.connector).state_dict()
    assert len(state) == 93 and sum(t.numel() for t in state.values()) == 66_820_608
    first, second = training.phases
    assert first.samples // first.batch == 280_000 and first.batch == 256 and first.rate == 1e-4
    assert second.resolution == 1024 and 100_000 <= second.samples < 100_000 + second.batch
    language_model = training.language_model
    assert (language_model.dtype, language_model.padding, language_model.max_length) == ("float16", "fixed", 128)
    assert (training.weight_decay, training.caption_drop, training.timesteps.kind) == (0.01, 0.1, "uniform")


@pytest.mark.parametrize(
    ("name", "adapter", "language_model", "tokens", "masked"),
    [
        ("lavi_t5_sd14", 1e-4, 5e-6, 77, False),
        ("lavi_llama2_sd14", 1e-4, 5e-6, 77, False),
        ("lavi_t5_pixart", 2e-5, 5e-6, 120, True),
    ],
)
def test_lavi_bridge_has_the_published_numbers(
    name: str, adapter: float, language_model: float, tokens: int, masked: bool
) -> None:
    training = load_recipe(name).trainings["lavi"]
    phase, inside, drawn = training.phases[0], training.language_model.lora, training.denoiser.lora
    assert inside is not None and drawn is not None
    assert phase.rate == adapter == phase.rate * drawn.rate_scale
    assert phase.rate * inside.rate_scale == pytest.approx(language_model)
    for lora in (inside, drawn):
        assert (lora.rank, lora.alpha / lora.rank, lora.dropout) == (32, 1.0, 0.1)
    assert training.language_model.max_length == tokens
    assert (training.language_model.pads, training.connector.use_mask) == (
        ("hidden", "mask") if masked else ("seen", "all")
    )
    assert (training.precision, training.language_model.dtype, training.denoiser.dtype) == ("no", "float32", "float32")
    assert (training.weight_decay, training.clip, training.connector.dropout) == (0.01, 1.0, 0.1)


def test_ellas_ablation_trains_each_row_alike() -> None:
    trainings = load_recipe("ella_tinyllama").trainings
    assert {training.phases[0].samples // training.phases[0].batch for training in trainings.values()} == {140_000}
    alike = {dataclasses.replace(t, connector=TSCConfig()) for name, t in trainings.items() if name != "tsc_mean"}
    assert len(alike) == 1 and trainings["tsc_mean"].language_model.layers == "mean"


def test_sdxl_trains_at_both_resolutions_at_its_own_rate() -> None:
    first, second = load_recipe("ella_sdxl").trainings["tsc"].phases
    assert (first.resolution, second.resolution) == (512, 1024) and first.rate == second.rate == 1e-5
    assert first.samples // 1_000_000 == 34 and 100_000 <= second.samples < 100_000 + second.batch


def test_a_base_arm_needs_a_base() -> None:
    evaluation = load_recipe("ella_sdxl").evaluation
    assert evaluation is not None and evaluation.base is None
    with pytest.raises(ValueError, match="arm 'base' draws with the base's own text encoder: name it as `base`"):
        dataclasses.replace(load_recipe("ella_sdxl"), evaluation=dataclasses.replace(evaluation, arms={"base": None}))


def test_the_second_view_is_stricter(ella: Recipe) -> None:
    small, _, large = (s.config.where for s in ella.stages if isinstance(s, Pack))
    assert small == "least(width, height) >= 512 AND clip_score >= 0.22 AND key >= '0004'"
    assert large == "least(width, height) >= 1024 AND clip_score >= 0.26 AND key >= '0004'"


def test_held_out_samples_are_trained_on_by_no_phase(ella: Recipe) -> None:
    keys = [f"{number:04x}{number:020x}" for number in (0, 3, 4, 5, 65_535)]
    columns = {"key": keys, "width": [2048] * 5, "height": [2048] * 5, "clip_score": [0.5] * 5}
    wheres = {s.config.view: s.config.where for s in ella.stages if isinstance(s, Pack)}
    found = {view: set(select_rows(pa.table(columns), where, view)) for view, where in wheres.items()}
    assert found == {"512": {*keys[2:]}, "held-out": {*keys[:2]}, "1024": {*keys[2:]}}
    validation = ella.trainings["tsc"].validation
    assert validation is not None and validation.view == "held-out"
    trained = dataclasses.replace(ella.trainings["tsc"], validation=dataclasses.replace(validation, view="held"))
    with pytest.raises(
        ValueError, match=r"training 'tsc' asks for view 'held', which no stage packs: perhaps .* held-out"
    ):
        dataclasses.replace(ella, trainings={"tsc": trained})


def test_without_a_judge_an_evaluation_says_so(ella: Recipe) -> None:
    assert ella.evaluation is not None
    with pytest.raises(ValueError, match="has no judge"):
        ella.evaluation.judge()


def test_a_trainings_fields_are_set_on_the_command_line() -> None:
    from jobs.recipe import parse
    from jobs.train import TrainOptions

    argv = [
        "examples/shapes/recipe.py",
        "--tsc.phases.0.rate",
        "5e-5",
        "--tsc.connector.queries",
        "8",
        "--processes",
        "2",
    ]
    recipe, options = parse(argv, "train", TrainOptions, "", sets="trainings")
    changed = recipe.trainings["tsc"]
    assert (changed.phases[0].rate, changed.connector.queries, options.processes) == (5e-5, 8, 2)
    assert recipe.trainings["mlp"] == parse(argv[:1], "train", TrainOptions, "", sets="trainings")[0].trainings["mlp"]


def test_names_that_a_recipe_does_not_have_are_told_with_the_nearest(ella: Recipe) -> None:
    from jobs.recipe import parse
    from jobs.train import TrainOptions

    with pytest.raises(ValueError, match=r"training 'tsc' asks for view '521', which no stage packs: perhaps .* 512"):
        parse(["ella_sd15", "--tsc.phases.0.view", "521"], "train", TrainOptions, "", sets="trainings")
    assert ella.evaluation is not None
    arms = dataclasses.replace(ella.evaluation, arms={"base": None, "tsc": "tcs"})
    with pytest.raises(ValueError, match="arm 'tsc' asks for training 'tcs': perhaps you meant tsc"):
        dataclasses.replace(ella, evaluation=arms)
    gains = dataclasses.replace(ella.evaluation, gains={"tsc_over_base": ("tsc", "bsae")})
    with pytest.raises(ValueError, match="gain 'tsc_over_base' compares arm 'bsae': perhaps you meant base"):
        dataclasses.replace(ella, evaluation=gains)


def test_a_recipe_without_views_may_train_on_those_of_another(ella: Recipe) -> None:
    alone = dataclasses.replace(ella, stages=())
    assert alone.trainings["tsc"].phases[0].view == "512"


def test_one_model_embeds_pictures_and_texts(ella: Recipe) -> None:
    from jobs.build import BuildOptions
    from jobs.recipe import parse

    names = [s.name for s in ella.stages]
    assert names.index("embed") < names.index("recaption") < names.index("score")
    with pytest.raises(ValueError, match="'score' is set for other/clip@main, but 'image_embedding', which it reads"):
        parse(["ella_sd15", "--score.model", "other/clip"], "build", BuildOptions, "")
    both = ["ella_sd15", "--score.model", "other/clip", "--embed.model", "other/clip"]
    assert parse(both, "build", BuildOptions, "")[0].name == ella.name


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("ella_")])
def test_ella_clips_no_gradients(name: str) -> None:
    assert {training.clip for training in load_recipe(name).trainings.values()} == {None}


def test_the_larger_sana_is_trained_at_1024_and_in_no_arm() -> None:
    recipe = load_recipe("queries_sana")
    small, large = recipe.trainings["sana_600m"], recipe.trainings["sana_1600m"]
    assert [(phase.view, phase.resolution) for phase in large.phases] == [("1024-qwen3", 1024)]
    assert large.language_model == small.language_model
    assert recipe.evaluation is not None and "sana_1600m" not in recipe.evaluation.arms.values()
