"""clip-retrieval's own environment, and talk with it.

Its pins (numpy 1, pyarrow 15) cannot live beside ours, so it gets a venv of its own with just what its `index` and `back`
import: wheels by digest from `requirements.txt`, 440 MB, under a minute. Not one of Ray's environments for a task: such a one
is made anew in each session, takes a cluster, and with all that clip-retrieval asks for (torch, models) has 7 GB.

    python -m jobs.clip_retrieval.environment      # makes it: for images, and for machines that lose their network later
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.fingerprint import digest_of

LOCK = Path(__file__).with_name("requirements.txt")
PROGRAM = Path(__file__).with_name("inside.py")
FOLDER = "DENSEBRIDGE_ENVIRONMENTS"
"""Environment variable that names the folder of such environments; ~/.cache/densebridge where it is not set."""
_MADE = "made"  # a file in an environment that is whole


def lock_id() -> str:
    """Digest of the locked requirements: another one is another environment."""
    return digest_of(LOCK.read_bytes())[:12]


def environment() -> Path:
    """The environment's Python. Where there is none, or half of one, it is made; of several processes one makes it and the
    others wait. Raises OSError in one line where it cannot be made.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "densebridge"
    folders = Path(os.environ.get(FOLDER) or cache).absolute()
    build = f"{sys.version_info.major}.{sys.version_info.minor}-{platform.machine()}"
    folder = folders / f"clip-retrieval-{build}-{lock_id()}"
    python = folder / "bin" / "python"
    if not _is_whole(folder, python):
        folders.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f"{folder.name}.lock")):
            if not _is_whole(folder, python):
                _make(folder, python)
    return python


def _is_whole(folder: Path, python: Path) -> bool:
    return (folder / _MADE).exists() and python.exists()  # python is a link: the one that it was made with may be gone


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock file, or waits for it. It is free again when its holder dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(folder: Path, python: Path) -> None:
    print(f"making clip-retrieval's environment in {folder}, once", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    wheels = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "--no-input", "--retries", "2", "--quiet"]
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [str(python), "-m", "pip", "install", "--disable-pip-version-check", *wheels, "-r", str(LOCK)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        if done.returncode:
            shutil.rmtree(folder, ignore_errors=True)
            raise OSError(
                f"clip-retrieval's environment cannot be made in {folder}: {_last_words(done.stderr + done.stdout)}: "
                "it takes a package index once (pip's own settings count); run it again where there is one"
            )
    (folder / _MADE).touch()


def _last_words(said: str) -> str:
    """The line in which a program says what is wrong: the last that calls itself an error, or the last."""
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["no word of why"]
    return next((line for line in reversed(lines) if "rror" in line), lines[-1])[:300]


class Inside:
    """`inside.py` at work: lines of JSON there and back. It ends when this does, or with this process."""

    def __init__(self, command: str, *arguments: str) -> None:
        self._command = command
        self._stderr = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed in __exit__)
        self._process = subprocess.Popen(
            [str(environment()), "-I", str(PROGRAM), command, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            start_new_session=True,  # Ctrl-C is for this process, which then ends it
        )
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def say(self, **question: Any) -> None:
        """A line to it."""
        assert self._process.stdin
        with suppress(BrokenPipeError):  # it has ended, which `hear` tells
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()

    def hear(self, timeout: float | None = None) -> dict[str, Any] | None:
        """Its next line; None where none came in so many seconds. Raises OSError where it has ended."""
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            return None
        if not line:
            self._stderr.seek(0)
            said = self._stderr.read()
            if os.environ.get("DENSEBRIDGE_TRACE"):
                print(said, file=sys.stderr)
            raise OSError(f"clip-retrieval's {self._command} ended: {_last_words(said)}")
        return json.loads(line)

    def ask(self, **question: Any) -> dict[str, Any]:
        """Its answer to a line."""
        self.say(**question)
        answer = self.hear()
        assert answer is not None
        return answer

    def __enter__(self) -> Inside:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout, self._stderr):
            assert pipe
            pipe.close()


if __name__ == "__main__":
    print(environment())
