"""What the process that started something on a cluster hears of it: what its workers tell, and that the head still answers."""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from .time_limit import within
from .workers import StageError

LOOK = 10.0  # seconds between two looks at the cluster
ANSWER = 30.0  # seconds that the head has for a look. Ray itself aborts the process once the head is silent for 60 s
SILENT = 120.0  # seconds that a board may take to answer

_Answer = TypeVar("_Answer")


class HeadLost(StageError):
    """The cluster's head does not answer: nothing more can be asked of the cluster, not even to end."""


class HeadWatch:
    """The head of the cluster that this process is joined to, asked now and then."""

    def __init__(self, so: str) -> None:
        """`so`: what a user is told to do if it is lost."""
        self._lost = f"the cluster's head has not answered for {ANSWER:.0f} s: {so}"
        self._asked = time.monotonic()
        self._failing = 0.0  # since when it gives no answer; 0: it does

    def ask(self, question: Callable[[], _Answer]) -> _Answer | None:
        """The answer; None where it is not yet time to ask again, and where the head is away for a moment. Raises HeadLost
        where it is for longer, and what the question raises as a StageError.
        """
        if time.monotonic() - self._asked < LOOK:
            return None
        return self._ask(question)

    def wait(self, question: Callable[[], _Answer]) -> _Answer:
        """The answer, as soon as it gives one. Raises as `ask`."""
        while (answer := self._ask(question)) is None:
            time.sleep(1)
        return answer

    def _ask(self, question: Callable[[], _Answer]) -> _Answer | None:
        import ray

        self._asked = now = time.monotonic()
        failing = now - self._failing if self._failing else 0.0
        try:
            answer = within(max(ANSWER - failing, 1.0), question, self._lost)
        except TimeoutError:
            raise self._leave() from None
        except StageError:
            raise
        except (ray.exceptions.RayError, RuntimeError):  # it may also be refused at once
            if failing >= ANSWER:
                raise self._leave() from None
            self._failing = self._failing or now
            return None
        self._failing = 0.0
        return answer

    def _leave(self) -> HeadLost:
        """Nobody says goodbye to a head that is lost: Ray would abort this process before it has said why it ends."""
        import ray

        atexit.unregister(ray.shutdown)
        return HeadLost(self._lost)


@contextmanager
def at_end(end: Callable[[], object]) -> Iterator[None]:
    """Calls `end` when the block ends, however it does, but where the head is lost, which it would ask."""
    lost = False
    try:
        yield
    except HeadLost:
        lost = True
        raise
    finally:
        if not lost:
            end()


def follow(board: Any, over: threading.Event, tell: Callable[[Any], None], look: Callable[[], object]) -> None:
    """Tells what the actor `board` was told (its `drain`) until it is over and all is told, and looks at the cluster meanwhile:
    a board that does not answer keeps nobody from that. Raises StageError where it stays silent, and what `look` raises.
    """
    import ray

    ended, asked, since = False, None, 0.0
    while asked or not ended:
        over.wait(0.5)
        if not asked:  # whether it is over is known before the board is asked, so that the last drain misses nothing
            ended, asked, since = over.is_set(), board.drain.remote(), time.monotonic()
        if ray.wait([asked], timeout=0.5)[0]:
            for item in ray.get(asked):
                tell(item)
            asked = None
        elif time.monotonic() - since > SILENT:
            raise StageError(f"what the workers tell cannot be had for {SILENT:.0f} s: the same command goes on")
        look()
