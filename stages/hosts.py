"""What one worker knows of the hosts it asks: their slots, their pace, their silences, and what their files say."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from .answers import Stopped
from .robots import SiteRules

_MOST_HOSTS, _MOST_RULES = 10_000, 300_000  # remembered from one batch to the next; about 100 bytes a rule
_OUTAGE = 300.0  # seconds after which a host that did not answer is asked once more


@dataclass(kw_only=True)
class Site:
    """What the files of one site (scheme, host and port) say, or why they could not be had."""

    rules: SiteRules = field(default_factory=SiteRules)
    unreachable: str = ""
    """The reason with which a URL fails here, empty where the files could be asked for."""
    transient: bool = False
    """Whether that may pass."""
    until: float = 0.0
    """Second, on the monotonic clock, at which it is to be asked anew."""


class Host:
    """One host: `slots` for requests in flight, turns at its pace."""

    def __init__(self, *, slots: int, interval: float) -> None:
        self.slots = asyncio.Semaphore(slots)
        self.silent = 0
        """Requests on end that got no answer."""
        self._asked_in_vain = 0.0
        self.interval = interval
        """Seconds between two requests."""
        self._next = self._held_until = 0.0

    def is_down(self, patience: int) -> bool:
        """Whether so many requests on end got no answer. Now and then one may ask all the same: outages pass."""
        now = time.monotonic()
        if self.silent < patience or now - self._asked_in_vain >= _OUTAGE:
            self._asked_in_vain = now
            return False
        return True

    async def turn(self, patience: float) -> None:
        """Waits until the host may be asked again. Raises Stopped("host_busy") instead if it asked to be left alone for
        longer than `patience` seconds.
        """
        while True:
            now = time.monotonic()
            at = max(now, self._next, self._held_until)
            if at - now > patience:
                raise Stopped("host_busy", transient=True)
            self._next = at + self.interval
            await asyncio.sleep(at - now)
            if self._held_until <= at:  # else it asked for more patience meanwhile
                return

    def hold(self, seconds: float) -> None:
        """Nobody asks this host for so many seconds."""
        self._held_until = max(self._held_until, time.monotonic() + seconds)


class Hosts:
    """Hosts by name and sites by origin, as long as the worker lives. The longest unseen are forgotten between batches."""

    def __init__(self, *, slots: int, interval: float) -> None:
        self._slots, self._interval = slots, interval
        self._hosts: dict[str, Host] = {}
        self._sites: dict[str, asyncio.Task[Site]] = {}

    def host(self, name: str) -> Host:
        """The host of this name."""
        found = self._hosts.pop(name, None) or Host(slots=self._slots, interval=self._interval)
        self._hosts[name] = found  # at the end: seen last
        return found

    async def site(self, origin: str, ask: Callable[[], Coroutine[Any, Any, Site]]) -> Site:
        """What the site's files say: of `ask`, which runs once for all who wait, until it is to be asked anew."""
        task = self._sites.pop(origin, None)
        if task is None or (task.done() and (_failed(task) or task.result().until <= time.monotonic())):
            task = asyncio.create_task(ask())
        self._sites[origin] = task
        return await task

    def forget(self) -> None:
        """Lets go of all but the hosts and sites seen last; called while nothing is in flight."""
        for name in list(self._hosts)[:-_MOST_HOSTS]:
            del self._hosts[name]
        count = 0
        for place, (origin, task) in enumerate(reversed(list(self._sites.items()))):
            count += 0 if _failed(task) else sum(map(len, task.result().rules.rules.values()))
            if place >= _MOST_HOSTS or count > _MOST_RULES or _failed(task):
                del self._sites[origin]


def _failed(task: asyncio.Task[Site]) -> bool:
    return task.cancelled() or task.exception() is not None
