"""What a user can get wrong ends in one clear line and a non-zero exit; help is there at once."""

from __future__ import annotations

import errno
import importlib
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from jobs.build import BuildOptions
from jobs.cli import JOBS, main, run
from jobs.recipe import parse
from pipeline.storage import Folder
from tests.small_stages import small_source, urls

ROOT = Path(__file__).parents[1]
RECIPE = "tests/small_recipe.py"
HEAVY = {"torch", "ray", "transformers", "diffusers", "accelerate", "webdataset", "img2dataset", "duckdb", "cv2"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("SMALL_FOLDER", str(tmp_path))
    monkeypatch.delenv("SMALL_BREAK", raising=False)
    monkeypatch.delenv("DENSEBRIDGE_TRACE", raising=False)
    return tmp_path


def complaint(capsys: pytest.CaptureFixture[str], job: str, *argv: str, code: int = 1) -> str:
    """The one line that the job ends with."""
    with pytest.raises(SystemExit) as ended:
        run(job, list(argv))
    said = capsys.readouterr().err
    assert ended.value.code == code, said
    assert said.startswith("densebridge: ") and len(said.splitlines()) == 1 and "Traceback" not in said, said
    return said


def build(capsys: pytest.CaptureFixture[str], recipe: Path | str = RECIPE, *flags: str) -> str:
    return complaint(capsys, "build", str(recipe), "--runner", "local", *flags)


def write_recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.py"
    path.write_text(dedent(text))
    return path


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    for code in (
        "sys.argv = ['densebridge', '--help']; main()",
        "import jobs.build, jobs.plan, jobs.status, jobs.submit",
    ):
        script = f"""
            import sys
            from jobs.cli import main
            try:
                {code}
            except SystemExit as end:
                assert end.code == 0
            print("heavy:", sorted({HEAVY!r} & set(sys.modules)))
        """
        done = subprocess.run(
            [sys.executable, "-c", dedent(script)], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
        )
        assert done.stdout.splitlines()[-1] == "heavy: []"


def test_help_lists_the_jobs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for argv, code in ((["--help"], 0), (["-h"], 0), ([], 2)):
        monkeypatch.setattr(sys, "argv", ["densebridge", *argv])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == code
        shown = capsys.readouterr().out
        assert all(f"  {job} " in shown for job in JOBS)


@pytest.mark.parametrize("job", JOBS)
def test_every_job_is_there_and_says_how_it_is_used(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert importlib.import_module(f"jobs.{job}").__doc__
    for argv, code in (([], 2), (["--help"], 0)):
        with pytest.raises(SystemExit) as ended:
            run(job, argv)
        assert ended.value.code == code and f"usage: densebridge {job}" in capsys.readouterr().out


def test_the_flags_of_every_stage_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run("build", [RECIPE, "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and all(f in shown for f in ("--runner", "--fetch.batch-size", "--choose.least"))


def test_an_unknown_job(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for job, near in (("bake", "there are: build, plan, "), ("buidl", "perhaps you meant build")):
        monkeypatch.setattr(sys, "argv", ["densebridge", job, RECIPE])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert f"there is no job {job!r}: {near}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--nope", "3"], "Unrecognized options: --nope, 3: see densebridge build tests/small_recipe.py --help"),
        (["--fetch.batch-sze", "3"], "(perhaps you meant --fetch.batch-size)"),
        (["--fetch.batchsize=3"], "(perhaps you meant --fetch.batch-size)"),
        (["--fecth.batch-size", "3"], "(perhaps you meant --fetch.batch-size)"),
        (["--fetch.needs.cpu", "3"], "(perhaps you meant --fetch.needs.cpus)"),
        (["--runer", "local"], "(perhaps you meant --runner)"),
        (["--fetch.batch-size", "3", "--choose.laest", "3", "--runer", "local"], "(perhaps you meant --choose.least)"),
        (["--fetch.batch-size", "many"], "Error parsing --fetch.batch-size: invalid literal for int()"),
        (["--runner", "cloud"], "invalid choice 'cloud' for argument '--runner'"),
        (["--fetch.needs.cpus", "-1"], "cpus, gpus and memory_gb cannot be negative"),
    ],
)
def test_a_wrong_flag(capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    assert message in complaint(capsys, "build", RECIPE, *flags)


def test_flags_before_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert "needs the recipe first: densebridge plan RECIPE --json" in complaint(capsys, "plan", "--json")


def test_no_such_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    for name, near in (
        ("nowhere.py", "there are: ella_llama2, ella_sd15, "),
        ("tests", "there are: ella_llama2, ella_sd15, "),
        ("ella_sd51", "perhaps you meant ella_sd15)"),
        ("recipes/ella-sd15.py", "perhaps you meant ella_sd15)"),
    ):
        said = complaint(capsys, "plan", name)
        assert f"no recipe at {name}: give a Python file or a recipe's name ({near}" in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recipe = (", "SyntaxError: '(' was never closed"),
        ("import nowhere", "ModuleNotFoundError: No module named 'nowhere'"),
        ("recipes = 3", "does not define `recipe = Recipe(...)`"),
        ("recipe = 3", "does not define `recipe = Recipe(...)`"),
        ("import os; os.environ['NOT_SET_ANYWHERE']", "KeyError: 'NOT_SET_ANYWHERE'"),
        ("from jobs.recipe import Recipe; recipe = Recipe(nam='x')",
         "Recipe has no setting 'nam': perhaps you meant name"),
        ("from stages import recaption as r; r.RecaptionConfig(engine=None, promt='p')",
         "RecaptionConfig has no setting 'promt': perhaps you meant prompts"),
        ("import dataclasses; from tests.small_recipe import recipe; dataclasses.replace(recipe, run='x')",
         "Recipe has no setting 'run': perhaps you meant runs"),
        ("from tests.small_recipe import Choose; Choose(confg=3)", "unexpected keyword argument 'confg'"),
        ("from stages.source import Source; Source(path='x', partition_size=0)", "partition_size must be at least 1"),
        ("from tests.small_recipe import *; recipe = Recipe(name='', dataset='', source=None, stages=(Choose(config),))",
         "stage 'choose' reads 'caption', which no stage before it writes: there are: key, "),
    ],
)  # fmt: skip
def test_a_broken_recipe(capsys: pytest.CaptureFixture[str], folder: Path, text: str, message: str) -> None:
    path = write_recipe(folder, text)
    said = complaint(capsys, "plan", str(path))
    assert message in said and str(path) in said


def test_a_source_that_is_not_there(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert f"source {folder}/source.parquet does not exist: check `source.path`" in build(capsys)


def test_no_url_column(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    (folder / "source.csv").write_text("link,text\nu://1,one\n")
    text = """
        import dataclasses
        from tests.small_recipe import Source, recipe
        recipe = dataclasses.replace(recipe, dataset=FOLDER + "/dataset", source=Source(path=FOLDER + "/source.csv"))
    """.replace("FOLDER", repr(str(folder)))
    assert "has no column 'url' (it has: link, text): set url_column" in build(capsys, write_recipe(folder, text))


def test_an_empty_source(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    small_source(folder, ["u://1", " "])
    assert "source.parquet, row 2, column 'url': no URL: correct the row, or set empty_urls" in build(capsys)
    small_source(folder, [])
    assert "has no row with a URL: there is nothing to build" in build(capsys)


VIEW = """
    import dataclasses
    import pyarrow as pa
    from pipeline.stage import Stage
    from stages.pack import Pack, PackConfig
    from tests.small_recipe import Fetch, SmallConfig, config, recipe

    class Facts(Stage):
        name = "facts"
        writes = pa.schema([("width", pa.int32()), ("height", pa.int32()), ("caption", pa.string()),
                            ("clip_score", pa.float32()), ("alt_score", pa.float32()), ("alt_supported", pa.bool_())])

    stages = (Fetch(config), Facts(SmallConfig()), Pack(PackConfig(view="v", resolution=1, tokenizers=(), where=WHERE)))
    recipe = dataclasses.replace(recipe, dataset=FOLDER + "/dataset", stages=stages)
"""


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("widht > 3", "stage 'pack_v' reads 'widht', which no stage before it writes: perhaps you meant width"),
        ("caption[1] > [3]", "view 'v': its condition 'caption[1] > [3]' is not valid: Binder Error"),
        ("clip_score >", "is not valid: syntax error"),
        ("caption IN (SELECT * FROM read_csv('/etc/passwd'))", "asks other rows"),
    ],
)
def test_a_bad_condition_shows_before_the_work(
    capsys: pytest.CaptureFixture[str], folder: Path, where: str, message: str
) -> None:
    small_source(folder, urls(4))
    assert message in build(
        capsys, write_recipe(folder, VIEW.replace("WHERE", repr(where)).replace("FOLDER", repr(str(folder))))
    )
    assert not (folder / "dataset").exists()


@pytest.mark.parametrize("where", ["partitions/", "fetch-", "choose-"])
def test_a_full_disk(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """In the ingest, in the first stage and in the last; afterwards the same command goes on."""
    small_source(folder, urls(4))
    publish = Folder._publish

    def full(dataset: Folder, path: Path, name: str) -> None:
        if name.startswith(where):
            raise OSError(errno.ENOSPC, "No space left on device", name)
        publish(dataset, path, name)

    with monkeypatch.context() as patched:
        patched.setattr(Folder, "_publish", full)
        said = build(capsys)
    assert "the disk is full" in said and where in said and "the same command goes on from there" in said
    assert not list(folder.rglob(".aside-*"))
    with pytest.raises(SystemExit) as ended:
        run("build", [RECIPE, "--runner", "local"])
    assert ended.value.code == 0


def test_a_stage_that_fails(capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_source(folder, urls(4))
    monkeypatch.setenv("SMALL_BREAK", "1")
    assert "stage 'describe', partition 000000-" in (said := build(capsys)) and "RuntimeError: no model here" in said


def test_a_dataset_that_cannot_be_written(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    small_source(folder, urls(4))
    (folder / "dataset").write_text("a file where a folder should be")
    assert str(folder / "dataset") in build(capsys)


def test_what_a_recipe_lacks(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert "recipe 'small' has no training: add one" in complaint(capsys, "train", RECIPE)
    assert "recipe 'small' has no evaluation: add one" in complaint(capsys, "evaluate", RECIPE)
    assert "nothing to draw: give --prompt" in complaint(capsys, "generate", RECIPE)


SHAPES = "examples/shapes/recipe.py"


@pytest.fixture
def no_models(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A mistake must show before any model is loaded, which takes minutes where models are real."""
    from training.denoisers import DenoiserConfig

    monkeypatch.setenv("SHAPES_BUILD", str(folder))
    monkeypatch.setattr(DenoiserConfig, "load", lambda _: pytest.fail("loaded a model first"))


def test_a_connector_that_is_not_trained_yet(capsys: pytest.CaptureFixture[str], no_models: None) -> None:
    assert "run `densebridge train` for training 'clip_mlp' first" in complaint(capsys, "evaluate", SHAPES)
    assert "run `densebridge train` for training 'tsc' first" in complaint(
        capsys, "generate", SHAPES, "--prompt", "A red cross."
    )
    assert "no training 'nope': there are: tsc," in complaint(capsys, "train", SHAPES, "--training", "nope")
    said = complaint(capsys, "train", SHAPES, "--training", "clip-mlp")
    assert "no training 'clip-mlp': perhaps you meant clip_mlp" in said


def test_prompts_that_are_none(capsys: pytest.CaptureFixture[str], folder: Path, no_models: None) -> None:
    (folder / "blank.txt").write_text("\n  \n")
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00")
    assert "nothing to draw" in complaint(capsys, "generate", SHAPES, "--prompts", str(folder / "blank.txt"))
    said = complaint(capsys, "generate", SHAPES, "--prompts", str(folder / "binary.txt"))
    assert f"{folder}/binary.txt is not a text file" in said
    assert str(folder / "nowhere") in complaint(capsys, "generate", SHAPES, "--prompts", str(folder / "nowhere"))


@pytest.mark.parametrize("flag", ["steps", "resolution"])
def test_zero_is_not_taken_for_the_default(capsys: pytest.CaptureFixture[str], no_models: None, flag: str) -> None:
    said = complaint(capsys, "generate", SHAPES, "--base", "--prompt", "A red cross.", f"--{flag}", "0")
    assert f"{flag} must be at least 1, got 0" in said


def test_interrupted(capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_source(folder, urls(4))
    monkeypatch.setattr("jobs.build.run_plan", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert "the same command goes on from there" in complaint(capsys, "build", RECIPE, code=130)


def test_on_request_there_is_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DENSEBRIDGE_TRACE", "1")
    with pytest.raises(FileNotFoundError):
        run("plan", ["nowhere.py"])


def test_a_build_and_then_nothing_to_do(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    small_source(folder, urls(12))
    for job, argv, words in (
        ("plan", [], ("plan (partitions; rows as far as names tell)", "fetch: new rows (3 partitions)")),
        ("build", ["--runner", "local"], ("funnel", "choose")),
        ("plan", ["--choose.least", "3"], ("choose: changed setting: least 11 → 3 (3 partitions)",)),
        ("build", ["--runner", "local"], ("is up to date: 3 partitions, 4 stages, nothing to do",)),
        ("status", ["--json"], ('"fetch": {"in": 12,',)),
        ("plan", ["--json"], ('"up_to_date": 3, "to_compute": 0',)),
    ):
        with pytest.raises(SystemExit) as ended:
            run(job, [RECIPE, *argv])
        shown = " ".join(capsys.readouterr().out.split())
        assert ended.value.code == 0 and all(word in shown for word in words), shown


def test_a_stage_may_have_a_dash_in_its_name(folder: Path) -> None:
    """As the pack stage of a view `art-512` has."""
    file = write_recipe(
        folder,
        """
        from dataclasses import replace
        from tests.small_recipe import config, recipe as small
        from tests.small_stages import Describe

        class Dashed(Describe):
            name = "describe_art-512"

        recipe = replace(small, stages=(*small.stages[:2], Dashed(config)))
        """,
    )
    recipe, _ = parse([str(file), "--describe-art-512.batch-size", "9"], "build", BuildOptions, "")
    assert [s.name for s in recipe.stages] == ["fetch", "first", "describe_art-512"]
    assert [s.config.batch_size for s in recipe.stages] == [3, 3, 9]
