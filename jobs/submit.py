"""Run a job on a Ray cluster and follow it to its end.

densebridge submit build RECIPE --address http://HEAD:8265 -- --recaption.batch-size 32

What follows `--` goes to the job. The repository travels as it lies here (without .venv, build and .git), so the recipe
must be in it, and its dataset where every node can reach it. A head that asks for a token gets Ray's: RAY_AUTH_TOKEN or
~/.ray/auth_token. Exit status: 0 the job succeeded, 1 it failed, 2 it could not be submitted, 3 it was stopped,
4 the head was lost from sight (the job may go on), 130 you stopped following (the job goes on).
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import logging
import os
import shlex
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pipeline.versions import commit

from .cli import JOBS, USER_ERRORS, fail, one_line
from .recipe import Recipe, load_recipe, read_flags

ROOT = Path(__file__).resolve().parents[1]
EXCLUDES = ["/.venv/", "/.git/", "/build/", "__pycache__/", "*.egg-info/", ".hypothesis/", ".*_cache/"]
_SECRET = ("TOKEN", "SECRET", "PASSWORD", "KEY")
_CALL, _UPLOAD, _PATIENCE, _POLL = 20.0, 600.0, 120.0, 2.0  # seconds
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class SubmitOptions:
    """Options of `densebridge submit`."""

    address: str = "http://127.0.0.1:8265"
    """Address of the cluster's dashboard, where Ray's Job API listens."""
    follow: bool = True
    """Show the job's output to its end and take over its exit status; otherwise return once it is submitted."""
    env: tuple[str, ...] = ()
    """NAME=VALUE pairs for the job. Whoever sees the cluster sees them: no secrets."""
    cpus: float = 0.0
    """CPU cores for the job's own process; a build's stages ask for theirs themselves."""
    gpus: float = 0.0
    """GPUs for the job's own process: a training needs them."""

    def __post_init__(self) -> None:
        if not self.address.startswith(("http://", "https://")):
            raise ValueError(f"address must start with http:// or https://, got {self.address!r}: give the dashboard's")
        if min(self.cpus, self.gpus) < 0:
            raise ValueError("cpus and gpus cannot be negative")
        for pair in self.env:
            name, equals, _ = pair.partition("=")
            if not name.isidentifier() or not equals:
                raise ValueError(f"env takes NAME=VALUE, got {pair!r}")
            if any(word in name.upper() for word in _SECRET):
                raise ValueError(f"env {name} looks like a secret, and all could read it: set it on the nodes")

    @property
    def variables(self) -> dict[str, str]:
        """`env` by name."""
        return {name: value for name, _, value in (pair.partition("=") for pair in self.env)}


def entrypoint(job: str, recipe: str, flags: Sequence[str]) -> str:
    """The command line that the cluster runs in the repository's root."""
    if Path(recipe).suffix:
        path = Path(recipe).resolve()
        if not path.is_relative_to(ROOT):
            raise ValueError(f"recipe {path} is not in {ROOT}, which is what goes to the cluster: move it there")
        recipe = path.relative_to(ROOT).as_posix()
    own = ["--address", "auto"] if job == "build" else []
    return shlex.join(["python", "-m", f"jobs.{job}", recipe, *own, *flags])


def check_places(job: str, recipe: Recipe) -> None:
    """Refuses folders that would be thrown away with the job's copy of the repository."""
    if recipe.folder.is_local and not Path(recipe.dataset.removeprefix("file://")).is_absolute():
        raise ValueError(f"dataset {recipe.dataset!r} is relative: give s3://… or an absolute path that nodes share")
    if job in ("train", "generate", "evaluate", "report") and not Path(recipe.runs).is_absolute():
        raise ValueError(f"runs {recipe.runs!r} is relative: give an absolute path that outlives the job")


def connect(address: str) -> Any:
    """Ray's job client. Raises ConnectionError or PermissionError in one line; warns where anyone may run anything."""
    wants_token = _asks_for_token(address)
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        os.environ.pop(name, None)  # they would win over the address given
    if wants_token:
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # ray reads it when it is imported
    else:
        print(f"warning: {address} asks for no token: whoever reaches it can run anything there", file=sys.stderr)
    logging.disable(logging.WARNING)  # ray tells of every file that it packs
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        return _within(_CALL, lambda: JobSubmissionClient(address))
    except (AuthenticationError, RuntimeError) as error:
        if not wants_token:
            raise ConnectionError(f"{address} refuses: {one_line(error)}") from None
        how = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the head's"
        raise PermissionError(f"{address} asks for a token and did not get the right one: {how}") from None


def _asks_for_token(address: str) -> bool:
    """Whether the head wants a token: asks it without one, with a timeout, before ray is imported."""
    try:
        with urllib.request.urlopen(f"{address.rstrip('/')}/api/jobs/", timeout=_CALL):
            return False
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return True
        raise ConnectionError(f"{address} answers {error.code}, so it is no Ray dashboard: check --address") from None
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(f"no Ray dashboard answers at {address} ({error}): check --address") from None


def submit(client: Any, command: str, options: SubmitOptions) -> str:
    """Uploads the repository, starts the command there and returns the submission's id."""
    told = {"DENSEBRIDGE_COMMIT": commit() or "", "PYTHONUNBUFFERED": "1"}
    environment = {"working_dir": str(ROOT), "excludes": EXCLUDES, "env_vars": told | options.variables}
    wants = {"entrypoint_num_cpus": options.cpus, "entrypoint_num_gpus": options.gpus}
    return _within(_UPLOAD, lambda: client.submit_job(entrypoint=command, runtime_env=environment, **wants))


def follow(client: Any, job: str) -> str:
    """Shows the job's output until it ends: SUCCEEDED, FAILED or STOPPED. TimeoutError when the head is gone."""
    ended, heard = threading.Event(), time.monotonic()
    tail = threading.Thread(target=_show_output, args=(client, job, ended), daemon=True)
    tail.start()
    try:
        while True:
            try:
                status = _within(_CALL, lambda: client.get_job_status(job))
                heard = time.monotonic()
                if status.is_terminal():
                    return str(status.value)
            except (OSError, RuntimeError) as error:
                if time.monotonic() - heard > _PATIENCE:
                    raise TimeoutError(f"no answer for {_PATIENCE:.0f} s ({one_line(error)})") from None
            time.sleep(_POLL)
    finally:
        ended.set()
        tail.join(timeout=_CALL)


def _show_output(client: Any, job: str, ended: threading.Event) -> None:
    """Prints the output as it comes. A proxy may cut a quiet stream; the next one skips what was shown."""
    shown = 0

    async def show() -> None:
        nonlocal shown
        skip = shown
        async for text in client.tail_job_logs(job):
            fresh, skip = text[skip:], max(0, skip - len(text))
            print(fresh, end="", flush=True)
            shown += len(fresh)

    while True:
        with contextlib.suppress(Exception):  # whatever breaks the stream: the job's end shows in its status
            asyncio.run(show())
        if ended.wait(_POLL):
            return


def _within(seconds: float, call: Callable[[], Result]) -> Result:
    """The call's result, or TimeoutError: Ray's client has no timeouts of its own."""
    future: Future[Result] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except Exception as error:  # raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    done, _ = wait([future], timeout=seconds)
    if not done:
        raise TimeoutError(f"the head does not answer within {seconds:.0f} s: check --address")
    return future.result()


def main(argv: list[str]) -> int:
    """Command line."""
    cut = argv.index("--") if "--" in argv else len(argv)
    if cut < 2 or "--help" in argv[:2]:
        print(f"usage: densebridge submit JOB RECIPE [OPTIONS] [-- JOB OPTIONS]\n\n{__doc__}")
        return 0 if "--help" in argv or "-h" in argv else 2
    job, recipe = argv[:2]
    try:
        if job not in JOBS or job == "submit":
            raise ValueError(f"no job {job!r} to submit: choose one of {', '.join(sorted({*JOBS} - {'submit'}))}")
        options = read_flags(SubmitOptions, argv[2:cut], "densebridge submit JOB RECIPE", __doc__ or "")
        os.environ.update(options.variables)  # the recipe may read them
        check_places(job, load_recipe(recipe))
        command = entrypoint(job, recipe, argv[cut + 1 :])
        client = connect(options.address)
        submission = submit(client, command, options)
    except (*USER_ERRORS, OSError, RuntimeError) as error:
        fail(one_line(error), 2)
    print(f"submitted {submission}: {command}", flush=True)
    if not options.follow:
        return 0
    try:
        status = follow(client, submission)
    except KeyboardInterrupt:
        fail(f"no longer following; the job goes on: `ray job stop {submission}` ends it", 130)
    except TimeoutError as error:
        fail(f"{one_line(error)}; the job may go on: `ray job status {submission}`", 4)
    print(f"{submission} {status.lower()}", flush=True)
    return {"SUCCEEDED": 0, "FAILED": 1}.get(status, 3)


if __name__ == "__main__":
    from .cli import run

    run("submit", sys.argv[1:])
