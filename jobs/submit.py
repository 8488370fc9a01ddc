"""Run a job on a Ray cluster and follow it to its end.

densebridge submit build RECIPE --address http://HEAD:8265 -- --recaption.batch-size 32

What follows `--` goes to the job. `build` takes the cluster's CPUs and GPUs by itself; `train` takes --processes of them, 1
where nothing is said; the other jobs run in one process, for which `evaluate`, `generate` and `report` want --gpus 1.
Datasets and runs lie where every node can reach them: DENSEBRIDGE_SOURCE, _DATASET, _RUNS and _CONTACT go along where they
are set here; where they are not, the nodes' own count.

The code is the repository as it lies here (without .venv, build and .git), so the recipe must be in it; or, with --root, what
is in the nodes' image. What travels needs the Ray that is installed here, to the last digit, and on the cluster a Python
that the project supports. Python here does not matter, and with --root neither does Ray.

Whoever reaches a head can run anything on it, so start it with RAY_AUTH_MODE=token: then RAY_AUTH_TOKEN or ~/.ray/auth_token
lets you in. Secrets of the job itself go into a file on the nodes, which --secrets names.

Exit status: 0 the job succeeded, 1 it failed, 2 it could not be submitted, 3 it was stopped, 4 the head was lost from sight
(the job may go on), 75 a training was asked to stop by others and has saved, 130 you stopped following (the job goes on: see
`densebridge jobs`).
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from pipeline.secrets import VARIABLE as SECRETS
from pipeline.versions import commit

from .cli import JOBS, USER_ERRORS, fail, one_line
from .follow import watch
from .head import Head, check_address, connect, measure
from .places import SUBMITTED, VARIABLES, check_places
from .recipe import load_recipe, read_flags

ROOT = Path(__file__).resolve().parents[1]
EXCLUDES = ("/.venv/", "/.git/", "/build/", "__pycache__/", "*.egg-info/", ".hypothesis/", ".*_cache/", "*.env")
_SECRET = {"TOKEN", "SECRET", "PASSWORD", "PASSWD", "KEY", "CREDENTIALS", "AUTH", "PAT"}
_PASSWORD = re.compile(r"://[^/\s@]*:[^/\s@]+@")
# Between SIGTERM and SIGKILL when the job is stopped: a training saves first. Ray's own is 3.
_GRACE = {"train": "600"}


@dataclass(frozen=True, kw_only=True)
class SubmitOptions:
    """Options of `densebridge submit`."""

    address: str = "http://127.0.0.1:8265"
    """Address of the cluster's dashboard, where Ray's Job API listens."""
    follow: bool = True
    """Show the job's output to its end and take over its exit status; otherwise return once it is submitted."""
    env: tuple[str, ...] = ()
    """NAME=VALUE pairs for the job. Whoever sees the cluster sees them: no secrets."""
    secrets: str | None = None
    """A file of NAME=VALUE lines on every node, such as /run/secrets/densebridge.env: the job's processes read it, and only its
    path is to be seen."""
    root: str | None = None
    """Folder of the repository in the nodes' image, such as /opt/densebridge: nothing is uploaded."""
    requirements: Path | None = None
    """A pip requirements file. Each node installs it before the job starts, which takes minutes; an image does not."""
    cpus: float = 0.0
    """CPU cores for the job's own process, on whichever node has them. It runs on the head where it asks for nothing."""
    gpus: float = 0.0
    """GPUs for the job's own process, likewise."""

    def __post_init__(self) -> None:
        check_address(self.address)
        if min(self.cpus, self.gpus) < 0:
            raise ValueError("cpus and gpus cannot be negative")
        for name, path in (("secrets", self.secrets), ("root", self.root)):
            if path is not None and not path.startswith("/"):
                raise ValueError(f"{name} is a path on the nodes, so it must be absolute, got {path!r}")
        if self.requirements and not self.requirements.is_file():
            raise FileNotFoundError(f"no requirements at {self.requirements}")
        for pair in self.env:
            name, equals, _ = pair.partition("=")
            if not name.isidentifier() or not equals:
                raise ValueError(f"env takes NAME=VALUE, got {pair!r}")
            if _SECRET & {*name.upper().split("_")}:
                raise ValueError(f"env {name} looks like a secret, and all could read it: use --secrets")

    @property
    def variables(self) -> dict[str, str]:
        """By name what the job is told: `env`, and the recipes' places as they are set here."""
        places = {name: os.environ[name] for name in VARIABLES if name in os.environ}
        return places | {name: value for name, _, value in (pair.partition("=") for pair in self.env)}


def entrypoint(job: str, recipe: str, flags: Sequence[str]) -> str:
    """The command line that the cluster runs in the repository's root."""
    if Path(recipe).suffix:
        path = Path(recipe).resolve()
        if not path.is_relative_to(ROOT):
            raise ValueError(f"recipe {path} is not in {ROOT}, which is what goes to the cluster: move it there")
        recipe = path.relative_to(ROOT).as_posix()
    own = ["--address", "auto"] if job in ("build", "train") else []
    return shlex.join(["python", "-m", f"jobs.{job}", recipe, *own, *flags])


def environment(job: str, options: SubmitOptions) -> dict[str, object]:
    """Ray's runtime environment of the job. All of it is for everyone to see."""
    told = {"PYTHONUNBUFFERED": "1", "RAY_JOB_STOP_WAIT_TIME_S": _GRACE.get(job, "30"), SUBMITTED: "1"}
    if options.secrets:
        told[SECRETS] = options.secrets
    made: dict[str, object] = {"working_dir": f"local://{options.root}"}
    if not options.root:
        told["DENSEBRIDGE_COMMIT"] = commit() or ""
        made = {"working_dir": str(ROOT), "excludes": list(EXCLUDES)}
    if options.requirements:
        made["pip"] = str(options.requirements)
    return {**made, "env_vars": told | options.variables}


def check_visible(command: str, options: SubmitOptions) -> None:
    """Refuses passwords in URLs, where everyone who sees the cluster could read them."""
    listed = options.requirements.read_text() if options.requirements else ""
    for where, text in (
        ("the job's flags", command),
        ("env", "\n".join(options.variables.values())),
        ("requirements", listed),
    ):
        if _PASSWORD.search(text):
            raise ValueError(f"{where} hold a URL with a password, which all could read: set it on the nodes")


def check_versions(ray: str, python: str, head: str) -> None:
    """Raises ValueError where the code of this repository cannot run on a cluster of these versions of Ray and Python."""
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    lowest, above = (int(minor) for minor in re.findall(r"3\.(\d+)", needs))
    supported = python == "?" or int(python.split(".")[1]) in range(lowest, above)
    if ray != version("ray") or not supported:
        here = "{}.{}.{}".format(*sys.version_info)
        raise ValueError(
            f"{head} runs Ray {ray} and Python {python}, here are Ray {version('ray')} and Python {here}: what is uploaded "
            f"needs Ray {version('ray')} and Python {needs} there; or use an image and --root"
        )


def warn_of_waiting(nodes: Sequence[Mapping[str, float]], options: SubmitOptions) -> None:
    """Says so where no node has what the job's own process asks for: it waits until the cluster has grown."""
    if options.cpus or options.gpus:
        enough = (n for n in nodes if n.get("CPU", 0) >= options.cpus and n.get("GPU", 0) >= options.gpus)
        if not any(True for _ in enough):
            most = ", ".join(f"{max((n.get(kind, 0) for n in nodes), default=0):g} {kind}s" for kind in ("CPU", "GPU"))
            asked = f"{options.cpus:g} CPUs and {options.gpus:g} GPUs"
            print(
                f"warning: the job asks for {asked}, and no node has more than {most}: it waits for one, up to 15 "
                "minutes (RAY_JOB_START_TIMEOUT_SECONDS on the head)",
                file=sys.stderr,
            )


def submit(head: Head, job: str, command: str, options: SubmitOptions) -> str:
    """Checks what can be checked beforehand, starts the command on the cluster and returns the job's id."""
    if not options.root:
        check_versions(head.ray, head.python, head.address)
        size, largest = measure(ROOT, EXCLUDES)
        print(f"the repository travels, {size / 1e6:.1f} MB: {largest}", flush=True)
    warn_of_waiting(head.nodes() if options.cpus or options.gpus else [], options)
    return head.submit(command, environment(job, options), cpus=options.cpus, gpus=options.gpus)


def main(argv: list[str]) -> int:
    """Command line."""
    cut = argv.index("--") if "--" in argv else len(argv)
    if cut < 2 or "--help" in argv[:2]:
        print(f"usage: densebridge submit JOB RECIPE [OPTIONS] [-- JOB OPTIONS]\n\n{__doc__}")
        return 0 if "--help" in argv or "-h" in argv else 2
    (job, recipe), flags = argv[:2], argv[cut + 1 :]
    try:
        can = sorted({*JOBS} - {"submit", "jobs", "retrieve", "search"})
        if job not in can:
            raise ValueError(f"no job {job!r} to submit: choose one of {', '.join(can)}")
        options = read_flags(SubmitOptions, argv[2:cut], "densebridge submit JOB RECIPE", __doc__ or "")
        os.environ.update(options.variables)  # the recipe may read them
        loaded = load_recipe(recipe)
        if not options.root:  # an image's environment may name its own places, which the job then checks
            check_places(job, loaded, flags)
        command = entrypoint(job, recipe, flags)
        check_visible(command, options)
        head = connect(options.address)
        submission = submit(head, job, command, options)
    except (*USER_ERRORS, OSError, RuntimeError) as error:
        fail(one_line(error), 2)
    print(f"submitted {submission}: {command}", flush=True)
    return watch(head, submission) if options.follow else 0


if __name__ == "__main__":
    from .cli import run

    run("submit", sys.argv[1:])
