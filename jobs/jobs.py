"""The jobs of a Ray cluster: list them, read what one says, stop one.

densebridge jobs list --address http://HEAD:8265
densebridge jobs logs ID --follow
densebridge jobs stop ID

Exit status of `logs --follow`: the job's, as `densebridge submit` has it. Of the others: 0 done (for `stop`: it runs no more),
2 the head does not answer or knows no such job, 4 the job still runs after --wait, or waits for a node and ends later.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from .cli import USER_ERRORS, fail, one_line
from .follow import watch
from .head import Head, Job, connect
from .recipe import read_flags

_POLL = 1.0  # seconds
_COMMAND = re.compile(r"(?:-m jobs\.|densebridge )(\w+) (\S+)")
ADDRESS = "http://127.0.0.1:8265"


@dataclass(frozen=True, kw_only=True)
class ListOptions:
    """Options of `densebridge jobs list`."""

    address: str = ADDRESS
    """Address of the cluster's dashboard."""
    json: bool = False
    """Print JSON instead of a table."""


@dataclass(frozen=True, kw_only=True)
class LogsOptions:
    """Options of `densebridge jobs logs`."""

    address: str = ADDRESS
    """Address of the cluster's dashboard."""
    follow: bool = False
    """Go on to the job's end, and take over its exit status."""


@dataclass(frozen=True, kw_only=True)
class StopOptions:
    """Options of `densebridge jobs stop`."""

    address: str = ADDRESS
    """Address of the cluster's dashboard."""
    wait: float = 660.0
    """Seconds to wait for its end: a training has 600 for saving."""

    def __post_init__(self) -> None:
        if self.wait < 0:
            raise ValueError(f"wait cannot be negative, got {self.wait}")


def list_jobs(head: Head, options: ListOptions) -> int:
    """Prints a line a job, the newest first."""
    jobs, now = head.jobs(), time.time()
    if options.json:
        print(json.dumps([asdict(job) for job in jobs]))
        return 0
    rows: list[tuple[str, ...]] = [("id", "job", "recipe", "status", "started (UTC)", "seconds")]
    rows += [_row(job, now) for job in jobs]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _row(job: Job, now: float) -> tuple[str, ...]:
    ours = _COMMAND.search(job.command)
    name, recipe = ours.groups() if ours else ("other", job.command.split("\n")[0][:40])
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(job.started))
    return job.id, name, recipe, job.status, started, f"{(job.ended or now) - job.started:.0f}"


def show_logs(head: Head, job: str, options: LogsOptions) -> int:
    """Prints what the job has said, or all that it says until its end."""
    head.job(job)  # says so where there is none
    if options.follow:
        return watch(head, job)
    print(head.logs(job), end="", flush=True)
    return 0


def stop_job(head: Head, job: str, options: StopOptions) -> int:
    """Asks the job to end and waits until it has."""
    found = head.job(job)
    if found.is_over:
        print(f"{job} had ended already: {found.status}")
        return 0
    head.stop(job)
    if found.status == "pending":  # nobody is there yet who could heed it
        fail(f"{job} has no node yet: Ray ends it when it gets one, or after 15 minutes", 4)
    print(f"{job} is asked to end, which may take it up to {options.wait:.0f} s: a training saves first", flush=True)
    end = time.monotonic() + options.wait
    while not (found := head.job(job)).is_over:
        if time.monotonic() > end:
            fail(
                f"{job} is still {found.status} after {options.wait:.0f} s, though it was asked to stop: {found.message}",
                4,
            )
        time.sleep(_POLL)
    print(f"{job} {found.status}")
    return 0


def main(argv: list[str]) -> int:
    """Command line."""
    usage = f"usage: densebridge jobs list|logs|stop [ID] [OPTIONS]\n\n{__doc__}"
    if not argv or argv[0] in ("-h", "--help"):
        print(usage)
        return 0 if argv else 2
    action, rest = argv[0], argv[1:]
    try:
        return _act(action, rest)
    except (*USER_ERRORS, OSError, RuntimeError) as error:
        fail(one_line(error), 2)


def _act(action: str, rest: Sequence[str]) -> int:
    about = f"densebridge jobs {action}"
    if action == "list":
        listing = read_flags(ListOptions, rest, about, __doc__ or "")
        return list_jobs(connect(listing.address), listing)
    if action not in ("logs", "stop"):
        raise ValueError(f"densebridge jobs {action}: choose one of list, logs, stop")
    job = rest[0] if rest and not rest[0].startswith("-") else ""
    flags = rest[1:] if job else rest
    if not job and not {"-h", "--help"} & {*rest}:
        raise ValueError(f"{about} needs a job's id first: `densebridge jobs list` shows them")
    if action == "logs":
        reading = read_flags(LogsOptions, flags, f"{about} ID", __doc__ or "")
        return show_logs(connect(reading.address), job, reading)
    stopping = read_flags(StopOptions, flags, f"{about} ID", __doc__ or "")
    return stop_job(connect(stopping.address), job, stopping)


if __name__ == "__main__":
    from .cli import run

    run("jobs", sys.argv[1:])
