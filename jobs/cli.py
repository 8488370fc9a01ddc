"""`densebridge <job> RECIPE ...`: finds the job and turns what a user can get wrong into one line and an exit code."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from typing import NoReturn

from pipeline.spelling import nearest

JOBS = {
    "build": "rebuild the dataset: only what is missing or changed",
    "plan": "show what a build would do, without opening a data file",
    "cost": "show what a build would take at any size: GPU-hours, storage, requests, time and money",
    "status": "show the funnel: in = kept + dropped + failed, at every stage",
    "explain": "tell one sample's whole story: every stage, every reason, every shard",
    "adopt": "take over the pictures of an img2dataset folder, which are then not fetched",
    "forget": "take samples down: by URL, domain or digest they go everywhere and stay out",
    "verify": "read a view again, every byte, and tell what is not as its manifest says",
    "gc": "show or delete what no recipe can reach any more",
    "train": "train a connector on the dataset's views",
    "generate": "draw pictures from prompts with a trained connector",
    "export": "write a trained connector for others: a diffusers folder or ELLA's file, with a model card",
    "evaluate": "compare connectors with the base on held-out prompts",
    "report": "write a page that shows dataset, training and pictures",
    "embeddings": "write the CLIP embeddings as clip-retrieval lays them out",
    "index": "make the dataset searchable: those embeddings in clip-retrieval's indices",
    "search": "find samples by text or picture, or serve such queries on this machine",
    "retrieve": "ask a clip-retrieval server and write a source table of what it answers",
    "submit": "run a job on a Ray cluster and follow it to its end",
    "jobs": "list a cluster's jobs, read what one says, stop one",
}
USER_ERRORS = (
    ValueError, FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, MemoryError, FloatingPointError,
)  # fmt: skip


def main() -> None:
    """The console script."""
    argv = sys.argv[1:]
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, JOBS))
        lines = [f"  {name:<{width}}  {about}" for name, about in JOBS.items()]
        print("usage: densebridge JOB RECIPE [OPTIONS]\n\njobs:\n" + "\n".join(lines))
        print("\n`densebridge JOB RECIPE --help` lists a job's options.")
        raise SystemExit(0 if argv else 2)
    if argv[0] not in JOBS:
        fail(f"there is no job {argv[0]!r}: {nearest(argv[0], JOBS)}", 2)
    run(argv[0], argv[1:])


def run(job: str, argv: list[str]) -> None:
    """Runs a job; user errors end in one line. Set DENSEBRIDGE_TRACE=1 for the traceback."""
    from pipeline.ray_head import HeadLost
    from pipeline.runner import StageError
    from pipeline.secrets import read_secrets

    try:
        read_secrets()
        code = importlib.import_module(f"jobs.{job}").main(argv)
    except (*USER_ERRORS, StageError, OSError) as error:
        if os.environ.get("DENSEBRIDGE_TRACE"):
            raise
        if isinstance(error, HeadLost):  # Ray's threads still call the head, and Python's own end would crash in them
            say(one_line(error))
            sys.stdout.flush()
            os._exit(1)
        fail(one_line(error), 1)
    except KeyboardInterrupt:
        fail("stopped; what was published stays, and the same command goes on from there", 130)
    raise SystemExit(code or 0)


def one_line(error: BaseException) -> str:
    """What a user is told of an error."""
    text = " ".join(str(error).split()) or type(error).__name__
    if f"[Errno {errno.ENOSPC}]" in text:  # in the text, because a stage's error comes from another process
        return f"the disk is full ({text}): free some space; the same command goes on from there"
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return f"the port is taken ({error}): choose another"
    return text


def fail(message: str, code: int) -> NoReturn:
    """Says what is wrong and ends."""
    say(message)
    raise SystemExit(code)


def say(message: str) -> None:
    """Says what is wrong."""
    sys.stderr.write(f"densebridge: {message}\n")  # in one piece, as several processes may say it at once


if __name__ == "__main__":
    main()
