"""The door to a Ray head's Job API: every call ends within its time, and what goes wrong is told in one line.

Ray's client is underneath, which by itself waits for ever.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import sys
import urllib.error
import urllib.request
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pipeline.time_limit import within

from .cli import one_line

CALL = 20.0
"""Seconds that the head has for an answer."""
_FIRST, _SECOND, _UPLOAD = 10.0, 15.0, 600.0  # seconds; a connection takes the first two, so it fails within 30
_WRONG_TOKEN = (
    "{} asks for a token and did not get the right one: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the head's"
)
Result = TypeVar("Result")


class UnknownJob(ValueError):
    """The head has no job of that id."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A submitted job, as the head tells of it."""

    id: str
    command: str
    """What it runs."""
    status: str
    """pending, running, stopped, succeeded or failed."""
    message: str
    """The status in Ray's words."""
    started: float
    """When it was submitted, seconds since 1970."""
    ended: float | None
    """When it ended, likewise."""
    code: int | None
    """Exit status of its process, where that has ended by itself."""

    @property
    def is_over(self) -> bool:
        """Whether nothing can change any more."""
        return self.status in ("stopped", "succeeded", "failed")


class Head:
    """A Ray head. Its methods raise OSError (TimeoutError among them) where it does not answer, UnknownJob where it does not
    know the job, PermissionError where it wants another token, RuntimeError where it cannot do what it is asked.
    """

    def __init__(self, address: str, client: Any) -> None:
        self.address, self._client = address, client
        self.ray = str(self._get("/api/version")["ray_version"])
        """Version of Ray there."""
        self.python = "?"
        """Version of Python there."""
        with contextlib.suppress(ValueError, KeyError, TypeError):  # old ones do not tell
            self.python = str(self._get("/api/v0/cluster_metadata")["data"]["pythonVersion"])

    def submit(self, command: str, environment: Mapping[str, Any], *, cpus: float, gpus: float) -> str:
        """Uploads the working folder where it is one of ours, starts the command there, and returns the job's id."""
        wants = {"entrypoint_num_cpus": cpus, "entrypoint_num_gpus": gpus}
        job = f"raysubmit_{uuid.uuid4().hex[:16]}"
        uploads = not str(environment.get("working_dir", "local://")).startswith("local://")
        try:
            return self._call(
                lambda: self._client.submit_job(
                    entrypoint=command, runtime_env=dict(environment), submission_id=job, **wants
                ),
                _UPLOAD if uploads else CALL,
            )
        except PermissionError:
            raise
        except OSError:  # the head may have it all the same, and only the answer was lost
            with contextlib.suppress(OSError, RuntimeError, UnknownJob):
                return self.job(job).id
            raise

    def jobs(self) -> list[Job]:
        """All submitted jobs that the head remembers, the newest first."""
        found = [_job(details) for details in self._call(self._client.list_jobs) if details.submission_id]
        return sorted(found, key=lambda job: job.started, reverse=True)

    def job(self, job: str) -> Job:
        """What is known of one."""
        return _job(self._call(lambda: self._client.get_job_info(job)))

    def logs(self, job: str) -> str:
        """All that it has said so far."""
        return self._call(lambda: self._client.get_job_logs(job), _UPLOAD)

    def tail(self, job: str) -> AsyncIterator[str]:
        """What it says, from its first word to its end. Has no time limit, and a broken connection may end it early."""
        return self._client.tail_job_logs(job)

    def stop(self, job: str) -> None:
        """Asks the job to end, by SIGTERM; it may take its time."""
        self._call(lambda: self._client.stop_job(job))

    def nodes(self) -> list[dict[str, float]]:
        """By resource (CPU, GPU, ...) how much each living node has in all."""
        listed = self._call(lambda: self._get("/api/v0/nodes?detail=1"))["data"]["result"]["result"]
        return [node["resources_total"] for node in listed if node["state"] == "ALIVE"]

    def _get(self, path: str) -> Any:
        """For what Ray's client has no method."""
        return self._client._do_request("GET", path, timeout=CALL).json()

    def _call(self, call: Callable[[], Result], seconds: float = CALL) -> Result:
        from ray.exceptions import AuthenticationError

        try:
            return _within(seconds, call, self.address)
        except AuthenticationError:
            raise PermissionError(_WRONG_TOKEN.format(self.address)) from None
        except RuntimeError as error:
            said = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no word of why"]
            if "status code 404" in said[0] and "does not exist" in str(error):
                raise UnknownJob(
                    f"{self.address} knows no such job: `densebridge jobs list --address {self.address}` shows them"
                ) from None
            raise RuntimeError(f"{self.address} cannot do it: {said[-1]}") from None


def _job(details: Any) -> Job:
    return Job(
        id=details.submission_id,
        command=details.entrypoint,
        status=details.status.value.lower(),
        message=details.message or "",
        started=(details.start_time or 0) / 1000,
        ended=details.end_time / 1000 if details.end_time else None,
        code=details.driver_exit_code,
    )


def check_address(address: str) -> None:
    """Raises ValueError where this can be no dashboard's address."""
    if not address.startswith(("http://", "https://")):
        raise ValueError(f"address must start with http:// or https://, got {address!r}: give the dashboard's")


def connect(address: str) -> Head:
    """The head at this address. Raises ConnectionError, TimeoutError or PermissionError in one line within 30 s; warns where
    anyone may run anything. A token is Ray's own: RAY_AUTH_TOKEN, or ~/.ray/auth_token.
    """
    check_address(address)
    wants_token = _within(_FIRST, lambda: _asks_for_token(address), address)
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        os.environ.pop(name, None)  # they would win over the address given
    if wants_token:
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # ray reads it when it is imported
    else:
        danger = "whoever reaches it can run anything there; start the head with RAY_AUTH_MODE=token"
        print(f"warning: {address} asks for no token: {danger}", file=sys.stderr)
    logging.disable(logging.WARNING)  # ray tells of every file that it packs
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        return _within(_SECOND, lambda: Head(address, JobSubmissionClient(address)), address)
    except (AuthenticationError, RuntimeError) as error:
        if not wants_token:
            raise ConnectionError(f"{address} refuses: {one_line(error)}") from None
        raise PermissionError(_WRONG_TOKEN.format(address)) from None


def _asks_for_token(address: str) -> bool:
    """Whether the head wants a token: asks it without one, before ray is imported."""
    try:
        with urllib.request.urlopen(f"{address.rstrip('/')}/api/version", timeout=_FIRST) as answer:
            if "ray_version" in json.loads(answer.read(1 << 16)):
                return False
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return True
        raise ConnectionError(f"{address} answers {error.code}, so it is no Ray dashboard: check --address") from None
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(f"no Ray dashboard answers at {address} ({error}): check --address") from None
    except ValueError:  # no JSON
        pass
    raise ConnectionError(f"{address} answers, but not as a Ray dashboard does: check --address")


def _within(seconds: float, call: Callable[[], Result], address: str) -> Result:
    """Ray's client has no timeouts of its own."""
    return within(seconds, call, f"{address} does not answer within {seconds:.0f} s: check --address")


def measure(root: Path, excludes: Sequence[str]) -> tuple[int, str]:
    """Bytes of the folder that would be uploaded, and its largest parts in words. By Ray's own walk, so that what is counted
    is what travels. Raises ValueError where it is more than Ray takes.
    """
    from ray._private.ray_constants import RAY_RUNTIME_ENV_IGNORE_GITIGNORE, get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE, _dir_travel, _get_excludes

    parts: Counter[str] = Counter()

    def count(path: Path) -> None:
        if path.is_file():
            parts["/".join(path.relative_to(root).parts[:2])] += path.stat().st_size

    left_out = [_get_excludes(root, [*get_runtime_env_default_excludes(), *excludes])]
    heeds = os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE) != "1"
    _dir_travel(root, left_out, count, include_gitignore=heeds)
    largest = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in parts.most_common(3))
    if parts.total() >= GCS_STORAGE_MAX_SIZE:
        limit = f"{GCS_STORAGE_MAX_SIZE / 1e6:.0f} MB"
        raise ValueError(
            f"the repository is {parts.total() / 1e6:.0f} MB, and Ray takes less than {limit}. Largest: {largest}. "
            "Move them out, name them in .rayignore, or use --root and an image"
        )
    return parts.total(), largest
