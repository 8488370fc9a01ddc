"""A host's turns, on a clock of the test's own: its pace, its Retry-After, and who waits too long."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from stages import hosts
from stages.answers import Stopped
from stages.hosts import Host, Hosts, Site
from stages.robots import Rule, SiteRules


class Clock:
    """Time that passes only in sleeps; sleepers wake in the order of their times."""

    def __init__(self) -> None:
        self.now = 100.0
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._count = 0

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self._count += 1
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sleepers.append((self.now + max(seconds, 0), self._count, future))
        await future

    async def run(self, *waiting: Any) -> list[Any]:
        """What all the coroutines come to; an exception counts as an answer."""
        tasks = [asyncio.ensure_future(w) for w in waiting]
        for _ in range(10_000):
            await asyncio.wait(tasks, timeout=0)
            if all(task.done() for task in tasks):
                break
            if self._sleepers:
                first = min(self._sleepers)
                self._sleepers.remove(first)
                self.now = max(self.now, first[0])
                first[2].set_result(None)
        return [task.exception() or task.result() for task in tasks]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    made = Clock()
    monkeypatch.setattr(hosts.time, "monotonic", made.monotonic)
    monkeypatch.setattr(hosts, "asyncio", type("Asyncio", (), {**vars(asyncio), "sleep": staticmethod(made.sleep)}))
    yield made


def turns(clock: Clock, host: Host, count: int, patience: float, hold: tuple[float, float] | None = None) -> list[Any]:
    """When each of `count` who come at once gets its turn, in seconds from now; `hold` is (when, for how long)."""

    async def turn() -> float:
        await host.turn(patience)
        return round(clock.now - 100, 3)

    async def stop() -> None:
        if hold:
            await clock.sleep(hold[0])
            host.hold(hold[1])

    return asyncio.run(clock.run(*(turn() for _ in range(count)), stop()))[:-1]


def test_turns_come_at_the_hosts_pace(clock: Clock) -> None:
    assert turns(clock, Host(slots=1, interval=0.5), 4, patience=10) == [0, 0.5, 1, 1.5]
    assert turns(clock, Host(slots=1, interval=0), 3, patience=10) == [1.5] * 3


def test_who_would_wait_too_long_is_told_at_once(clock: Clock) -> None:
    got = turns(clock, Host(slots=1, interval=2), 5, patience=5)
    assert got[:3] == [0, 2, 4] and all(isinstance(g, Stopped) for g in got[3:])
    assert [(g.reason, g.transient) for g in got[3:]] == [("host_busy", True)] * 2


def test_a_host_that_asks_for_patience_gets_it_from_all(clock: Clock) -> None:
    """Those who were already in line as well, and at its pace again afterwards."""
    assert turns(clock, Host(slots=1, interval=1), 5, patience=60, hold=(1.5, 10)) == [0, 1, 11.5, 12.5, 13.5]


def test_too_much_patience_is_not_had(clock: Clock) -> None:
    got = turns(clock, Host(slots=1, interval=1), 3, patience=60, hold=(0.5, 3600))
    assert got[0] == 0 and [g.reason for g in got[1:]] == ["host_busy"] * 2


def test_a_sites_files_are_asked_once_and_again_when_they_are_old(clock: Clock) -> None:
    asked = []

    async def ask() -> Site:
        asked.append(clock.now)
        return Site(rules=SiteRules(crawl_delay=len(asked)), until=clock.now + 60)

    async def run() -> list[float]:
        known = Hosts(slots=1, interval=0)
        first = await asyncio.gather(*(known.site("https://a.example", ask) for _ in range(3)))
        clock.now += 59
        first.append(await known.site("https://a.example", ask))
        first.append(await known.site("http://a.example", ask))
        clock.now += 2
        first.append(await known.site("https://a.example", ask))
        return [site.rules.crawl_delay for site in first]

    assert asyncio.run(run()) == [1, 1, 1, 1, 2, 3]


def test_only_so_many_hosts_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "_MOST_HOSTS", 2)
    known = Hosts(slots=3, interval=0)
    first, second, third = (known.host(name) for name in "abc")
    assert known.host("a") is first
    known.forget()
    assert known.host("a") is first and known.host("c") is third and known.host("b") is not second


def test_only_so_many_rules_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "_MOST_RULES", 5)
    asked = []

    async def run() -> None:
        known = Hosts(slots=3, interval=0)

        async def ask(origin: str) -> Site:
            asked.append(origin)
            rules = SiteRules(rules={"robots-disallow": [Rule(pattern="/", says=True)] * 2})
            return Site(rules=rules, until=float("inf"))

        for _ in range(2):
            for origin in ("a", "b", "c"):
                await known.site(origin, lambda origin=origin: ask(origin))  # type: ignore[misc]
            known.forget()

    asyncio.run(run())
    assert asked == ["a", "b", "c", "a"]  # b and c are four rules
