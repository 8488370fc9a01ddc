"""Submitting to a real local head: a build that succeeds, one that fails, and what cannot be submitted."""

from __future__ import annotations

import hashlib
import os
import urllib.request
from pathlib import Path

import pytest

from jobs.places import VARIABLES
from jobs.submit import SubmitOptions, check_versions, check_visible, entrypoint, environment, main
from jobs.submit import version as installed
from pipeline.funnel import count_funnel
from pipeline.partitions import list_partitions
from pipeline.plan import make_plan
from pipeline.storage import Folder
from tests.ray_heads import ROOT, densebridge, free_ports
from tests.small_stages import SmallConfig, small_source, small_stages, urls

RECIPE = "tests/small_recipe.py"


@pytest.mark.timeout(600)
def test_a_build_runs_on_the_cluster_and_its_secret_stays_one(head: str, short_folder: Path, tmp_path: Path) -> None:
    small_source(tmp_path, urls(17))
    secret, file = os.urandom(16).hex(), tmp_path / "secrets.env"
    file.write_text(f"# for the stages\nSMALL_SECRET={secret}\n")
    given = ("--env", f"SMALL_FOLDER={tmp_path}", "--secrets", str(file), "--", "--fetch.batch-size", "2")
    done = densebridge("submit", "build", RECIPE, "--address", head, *given)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "python -m jobs.build tests/small_recipe.py --address auto --fetch.batch-size 2" in done.stdout
    assert "the repository travels" in done.stdout and "funnel" in done.stdout
    assert done.stdout.rstrip().endswith("succeeded")
    assert "asks for no token" in done.stderr and len(done.stderr.splitlines()) == 1

    dataset = Folder(url=str(tmp_path / "dataset"))
    stages = small_stages(SmallConfig(), choose=SmallConfig(least=11))
    plan = make_plan(dataset, stages, list_partitions(dataset))
    assert plan.is_empty and count_funnel(dataset, stages, plan.tickets)["fetch"].given == 17
    (run,) = (tmp_path / "dataset" / "runs").rglob("run.json")
    assert '"commit": null' not in run.read_text() or not (ROOT / ".git").exists()

    seen = hashlib.sha256(secret.encode()).hexdigest()
    assert (tmp_path / "saw-job").read_text() == (tmp_path / "saw-worker").read_text() == seen
    told = done.stdout + done.stderr + "".join(answers(head)) + run.read_text()
    assert str(file) in told and secret not in told
    assert [path for path in short_folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()] == []


def answers(head: str) -> list[str]:
    """All that a head tells of its jobs and their processes."""
    pages = ("jobs/", "v0/jobs?detail=1", "v0/actors?detail=1", "v0/workers?detail=1", "v0/tasks?detail=1")
    found = []
    for page in (*pages, "v0/runtime_envs?detail=1"):
        with urllib.request.urlopen(f"{head}/api/{page}", timeout=60) as answer:
            found.append(answer.read().decode())
    return found


@pytest.mark.timeout(600)
def test_a_failing_build_ends_with_1_and_the_stages_message(head: str, tmp_path: Path) -> None:
    small_source(tmp_path, urls(4))
    given = ("--env", f"SMALL_FOLDER={tmp_path}", "SMALL_BREAK=1")
    done = densebridge("submit", "build", RECIPE, "--address", head, *given, "--", "--runner", "local")
    assert done.returncode == 1, done.stdout + done.stderr
    assert (
        "densebridge: stage 'describe', partition 000000-" in done.stdout
        and "RuntimeError: no model here" in done.stdout
    )
    assert "Traceback" not in done.stdout + done.stderr and done.stdout.rstrip().endswith("failed")


@pytest.mark.timeout(600)
def test_an_image_s_repository_is_used_where_it_lies(head: str, tmp_path: Path) -> None:
    """This one is there, as the head runs on this machine."""
    small_source(tmp_path, urls(4))
    given = ("--root", str(ROOT), "--env", f"SMALL_FOLDER={tmp_path}", "--cpus", "1")
    done = densebridge("submit", "plan", RECIPE, "--address", head, *given)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "travels" not in done.stdout and "describe" in done.stdout and done.stdout.rstrip().endswith("succeeded")


@pytest.mark.timeout(400)
def test_without_following_it_returns_at_once_and_says_what_it_waits_for(head: str, tmp_path: Path) -> None:
    given = ("--no-follow", "--gpus", "1", "--env", f"SMALL_FOLDER={tmp_path}")
    done = densebridge("submit", "plan", RECIPE, "--address", head, *given)
    assert done.returncode == 0 and "submitted raysubmit_" in done.stdout and "succeeded" not in done.stdout
    assert (
        "asks for 0 CPUs and 1 GPUs, and no node has more than 2 CPUs, 0 GPUs: it waits for one, up to 15 minutes"
        in done.stderr
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("build", RECIPE), "no Ray dashboard answers at http://127.0.0.1:"),
        (("bake", RECIPE), "no job 'bake' to submit: "),
        (("search", RECIPE), "no job 'search' to submit: "),
        (("build", "tests/none.py"), "no recipe at tests/none.py"),
        (("build", RECIPE, "--env", "HF_TOKEN=1"), "env HF_TOKEN looks like a secret"),
    ],
)
def test_what_cannot_be_submitted_says_so_in_one_line(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{free_ports(1)[0]}"
    done = densebridge("submit", *arguments, "--address", address, timeout=60, SMALL_FOLDER=str(tmp_path))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("densebridge: ") and message in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_command_names_the_recipe_from_the_root() -> None:
    assert entrypoint("plan", str(ROOT / RECIPE), []) == f"python -m jobs.plan {RECIPE}"
    train = entrypoint("train", "ella_sd15", ["--processes", "8"])
    assert train == "python -m jobs.train ella_sd15 --address auto --processes 8"
    with pytest.raises(ValueError, match="which is what goes to the cluster"):
        entrypoint("build", "/elsewhere/recipe.py", [])


def test_the_environment_says_where_code_secrets_and_places_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "more.txt").write_text("einops==0.8.2\n")
    made = environment("build", SubmitOptions(requirements=tmp_path / "more.txt", env=("A=1",)))
    assert made["working_dir"] == str(ROOT) and made["pip"] == str(tmp_path / "more.txt")
    assert "/.venv/" in made["excludes"] and made["env_vars"]["A"] == "1"  # type: ignore[operator,index]
    made = environment("train", SubmitOptions(root="/opt/densebridge", secrets="/run/secrets/s.env"))
    assert made["working_dir"] == "local:///opt/densebridge"
    assert made["env_vars"] == {
        "PYTHONUNBUFFERED": "1",
        "RAY_JOB_STOP_WAIT_TIME_S": "600",  # a training saves when it is stopped
        "DENSEBRIDGE_SECRETS": "/run/secrets/s.env",
        "DENSEBRIDGE_SUBMITTED": "1",
    }
    monkeypatch.setenv("DENSEBRIDGE_DATASET", "s3://here/dense")
    monkeypatch.setenv("DENSEBRIDGE_RUNS", "/here/runs")
    made = environment("build", SubmitOptions(env=("DENSEBRIDGE_RUNS=/there/runs",)))
    told = made["env_vars"]
    assert isinstance(told, dict)
    assert told["DENSEBRIDGE_DATASET"] == "s3://here/dense" and told["DENSEBRIDGE_RUNS"] == "/there/runs"
    assert "DENSEBRIDGE_SOURCE" not in told


def test_places_that_only_the_nodes_know_are_checked_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --root what lies here is what runs, so its places are checked before anybody is asked."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    argv = ["build", "ella_sd15", "--address", f"http://127.0.0.1:{free_ports(1)[0]}"]
    for more, message in (
        ([], "dataset 'build/dense' is relative"),
        (["--root", "/opt/densebridge"], "no Ray dashboard"),
    ):
        with pytest.raises(SystemExit):
            main(argv + more)
        assert message in capsys.readouterr().err


def test_names_that_look_like_secrets_do_so_by_whole_words() -> None:
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "db_passwd", "GITHUB_PAT", "KEY"):
        with pytest.raises(ValueError, match=f"env {name} looks like a secret"):
            SubmitOptions(env=(f"{name}=1",))
    SubmitOptions(env=("TOKENIZERS_PARALLELISM=false", "KEYBOARD=1", "PATH_EXTRA=1"))


def test_passwords_in_urls_are_refused(tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("package @ https://me:hidden@pypi.example/package.whl\n")
    for command, options in (
        ("python -m jobs.build r --source.path https://me:hidden@host/x", SubmitOptions()),
        ("python", SubmitOptions(env=("A=s3://me:hidden@bucket",))),
        ("python", SubmitOptions(requirements=tmp_path / "more.txt")),
    ):
        with pytest.raises(ValueError, match="a URL with a password") as caught:
            check_visible(command, options)
        assert "hidden" not in str(caught.value)
    check_visible("python -m jobs.build r --source.path https://host:80/x@y", SubmitOptions())


def test_versions_that_matter_must_fit() -> None:
    ours = installed("ray")
    for python in ("3.11.0", "3.12.9", "?"):
        check_versions(ours, python, "http://h")
    for ray, python in ((ours, "3.10.2"), (ours, "3.13.0"), ("2.9.0", "3.11.0"), (f"{ours}.1", "3.11.0")):
        with pytest.raises(ValueError, match=f"runs Ray {ray} and Python {python}, here are Ray {ours} and Python 3"):
            check_versions(ray, python, "http://h")


def test_options_are_checked(tmp_path: Path) -> None:
    for wrong, message in (
        ({"address": "localhost:8265"}, "must start with http://"),
        ({"env": ("A",)}, "NAME=VALUE"),
        ({"gpus": -1.0}, "cannot be negative"),
        ({"root": "opt"}, "root is a path on the nodes, so it must be absolute"),
        ({"secrets": "s.env"}, "secrets is a path on the nodes"),
    ):
        with pytest.raises(ValueError, match=message):
            SubmitOptions(**wrong)
    with pytest.raises(FileNotFoundError, match="no requirements at"):
        SubmitOptions(requirements=tmp_path / "none.txt")
    assert SubmitOptions(env=("A=b=c",)).variables == {"A": "b=c"}
