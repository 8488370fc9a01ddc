"""Following a job on a cluster: its output as it comes, through cut connections, to its end."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import time

from .cli import fail, one_line
from .head import CALL, Head, Job, UnknownJob

_POLL, _PENDING, _SILENT, _QUIET, _PATIENCE = 2.0, 20.0, 20.0, 300.0, 300.0  # seconds
SAVED = 75
"""Exit status of a training that was asked to stop and has saved: training.processes.INTERRUPTED, without its imports."""


def watch(head: Head, job: str) -> int:
    """Follows the job and says how it ended. The exit status: 0 it succeeded, 1 it failed, 3 it was stopped, 4 the head was
    lost from sight, or knows the job no more, 75 it was asked to stop by others than us and has saved, 130 the user stopped
    following.
    """
    there = f"{job} --address {head.address}"
    try:
        found = follow(head, job)
    except KeyboardInterrupt:
        again = f"`densebridge jobs logs {there} --follow` shows it, `densebridge jobs stop {there}` ends it"
        fail(f"no longer following; the job goes on: {again}", 130)
    except TimeoutError as error:
        fail(f"{one_line(error)}; the job may go on: `densebridge jobs logs {there} --follow`", 4)
    except UnknownJob:
        how = "it was started again without its memory, and the job is gone. Submit it again: what was published stays"
        fail(f"{head.address} no longer knows {job}: {how}", 4)
    if found.status == "failed" and found.code == SAVED:
        print(f"{job} was asked to stop and has saved: submit it again to go on", flush=True)
        return SAVED
    print(f"{job} {found.status}", flush=True)
    return {"succeeded": 0, "failed": 1}.get(found.status, 3)


def follow(head: Head, job: str) -> Job:
    """Shows the job's output until it ends, and returns what is known of it then. TimeoutError when the head is gone,
    UnknownJob when it does not know the job.
    """
    output = _Output(head, job)
    begun = heard = time.monotonic()
    lost = waits = False
    try:
        while True:
            try:
                found = head.job(job)
                heard = time.monotonic()
                if lost:
                    _note(f"{head.address} answers again")
                lost = False
                if found.is_over:
                    output.finish()
                    if found.status == "failed" and not found.message.startswith("Job entrypoint command"):
                        _note(found.message.strip().splitlines()[-1])  # it never ran, so its output does not say why
                    return found
                if found.status == "pending" and not waits and heard - begun > _PENDING:
                    _note(found.message)
                    waits = True
            except (OSError, RuntimeError) as error:
                silent = time.monotonic() - heard
                if silent > _PATIENCE:
                    raise TimeoutError(f"no answer for {_PATIENCE:.0f} s ({one_line(error)})") from None
                if silent > _SILENT and not lost:
                    _note(f"no answer for {silent:.0f} s ({one_line(error)}), trying on for {_PATIENCE:.0f} s")
                    lost = True
            time.sleep(_POLL)
    finally:
        output.close()


def _note(text: str) -> None:
    """Ours, so that it is not taken for the job's."""
    print(f"densebridge: {' '.join(text.split())}", file=sys.stderr, flush=True)


class _Output:
    """A job's output, shown as it comes by a thread. A proxy may cut the stream, or let it fall silent for good: the next one
    begins at the first word again, and only what is new is shown.
    """

    def __init__(self, head: Head, job: str) -> None:
        self._head, self._job = head, job
        self._shown = 0  # characters
        self._lock, self._over, self._closed = threading.Lock(), threading.Event(), False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Shows what is still missing, after the job has ended."""
        self._over.set()
        self._thread.join(CALL)
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # the node that ran it may be gone with its log
            self._show(0, self._head.logs(self._job))

    def close(self) -> None:
        """Shows nothing any more."""
        self._over.set()
        with self._lock:
            self._closed = True

    def _run(self) -> None:
        while not self._over.is_set():
            with contextlib.suppress(Exception):  # whatever breaks the stream: the job's end shows in its status
                asyncio.run(self._stream())
            self._over.wait(_POLL)

    async def _stream(self) -> None:
        place, stream = 0, self._head.tail(self._job)
        while True:
            try:
                text = await asyncio.wait_for(anext(stream), _QUIET)
            except StopAsyncIteration:
                return
            place = self._show(place, text)

    def _show(self, place: int, text: str) -> int:
        """Shows what is new of text that begins at this place of the output; returns the place of its end."""
        end = place + len(text)
        with self._lock:
            if not self._closed and end > self._shown:
                print(text[max(0, self._shown - place) :], end="", flush=True)
                self._shown = end
        return end
