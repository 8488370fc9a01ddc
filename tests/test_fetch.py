"""The fetcher against a server that means harm, and against the shapes server that has ordinary bad days."""

from __future__ import annotations

import asyncio
import gzip
import ipaddress
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from aiohttp import web

from stages.addresses import CheckedResolver, is_public
from stages.fetch import FetchConfig, Fetched, fetch, fetch_all

QUICK = FetchConfig(allow_private_hosts=True, timeout=20.0, backoff=0.01, max_bytes=1 << 20, retries=2)
BODY = bytes(range(256)) * 40


class Hostile:
    """Handlers by name; counts what was asked and how many requests were in flight at most."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.headers: list[dict[str, str]] = []
        self.in_flight = self.most_in_flight = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        self.asked[name] += 1
        self.headers.append(dict(request.headers))
        self.in_flight += 1
        self.most_in_flight = max(self.in_flight, self.most_in_flight)
        try:
            handler: Callable[[web.Request], Awaitable[web.StreamResponse]] | None = getattr(self, f"on_{name}", None)
            return await handler(request) if handler else web.Response(body=BODY, content_type="image/x-test")
        finally:
            self.in_flight -= 1

    async def on_drip(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(100):  # 10 s in all, and never silent for long
            await response.write(b"x")
            await asyncio.sleep(0.1)
        return response

    async def on_giant(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()  # chunked: no Content-Length to warn of it
        await response.prepare(request)
        for _ in range(1000):
            await response.write(bytes(1 << 16))
            self.asked["giant chunks"] += 1
        return response

    async def on_bomb(self, request: web.Request) -> web.StreamResponse:
        return web.Response(body=gzip.compress(bytes(50 << 20)), headers={"Content-Encoding": "gzip"})

    async def on_packed(self, request: web.Request) -> web.StreamResponse:
        return web.Response(body=gzip.compress(BODY), headers={"Content-Encoding": "gzip"})

    async def on_cut(self, request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\nonly this")
        request.transport.close()
        return web.Response()

    async def on_garbage(self, request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.write(b"\x00\xff not http at all\r\n\r\n")
        request.transport.close()
        return web.Response()

    async def on_to(self, request: web.Request) -> web.StreamResponse:
        return web.Response(status=302, headers={"Location": request.query["url"]})

    async def on_hops(self, request: web.Request) -> web.StreamResponse:
        left = int(request.query["left"])
        return web.Response(status=301, headers={"Location": f"hops?left={left - 1}" if left else "/picture"})

    async def on_status(self, request: web.Request) -> web.StreamResponse:
        return web.Response(status=int(request.query["code"]), body=b"an error page")

    async def on_busy(self, request: web.Request) -> web.StreamResponse:
        if self.asked["busy"] > 1:
            return web.Response(body=BODY)
        return web.Response(status=429, headers={"Retry-After": request.query["after"]})

    async def on_robots(self, request: web.Request) -> web.StreamResponse:
        response = web.Response(body=BODY)
        for value in request.query.getall("tag"):
            response.headers.add("X-Robots-Tag", value)
        return response

    async def on_tdm(self, request: web.Request) -> web.StreamResponse:
        return web.Response(body=BODY, headers={"TDM-Reservation": "1"})

    async def on_empty(self, request: web.Request) -> web.StreamResponse:
        return web.Response()

    async def on_wait(self, request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.05)
        return web.Response(body=BODY, headers={"Set-Cookie": "id=1"})

    async def on_silent(self, request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(60)
        return web.Response()


def ask(*paths: str, config: FetchConfig = QUICK) -> tuple[list[Fetched], Hostile]:
    """What the fetcher makes of these paths of a hostile server; a path that begins with http is a URL as it is."""

    async def run() -> tuple[list[Fetched], Hostile]:
        hostile, app = Hostile(), web.Application()
        app.router.add_get("/{name}", hostile.answer)
        runner = web.AppRunner(app, shutdown_timeout=0.01)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        urls = [
            p.replace("PORT", str(port)) if p.startswith("http://") else f"http://127.0.0.1:{port}/{p}" for p in paths
        ]
        try:
            return await fetch_all(urls, config), hostile
        finally:
            await runner.cleanup()

    return asyncio.run(run())


def one(path: str, config: FetchConfig = QUICK) -> Fetched:
    (fetched,), _ = ask(path, config=config)
    return fetched


def test_a_plain_body() -> None:
    got = one("picture")
    assert (got.status, got.reason, got.data, got.http_status) == ("ok", "", BODY, 200)
    assert (got.attempts, got.transient, got.opt_out, got.content_type) == (1, False, "", "image/x-test")


def test_order_is_kept_and_a_repeated_url_is_asked_for_once() -> None:
    got, hostile = ask("a", "status?code=404", "b", "a")
    assert [f.reason for f in got] == ["", "http_404", "", ""]
    assert got[0] is got[3] and hostile.asked["a"] == 1


def test_we_say_who_we_are_and_carry_no_cookies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # would refuse every connection, if it were obeyed
    _, hostile = ask(
        "wait", "wait?again", config=replace(QUICK, concurrency=1, user_agent="testbot/2 (+me@example.org)")
    )
    assert {h["User-Agent"] for h in hostile.headers} == {"testbot/2 (+me@example.org)"}
    assert not any("Cookie" in h for h in hostile.headers)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("", "bad_url"),
        ("picture.jpg", "bad_url"),
        ("http://", "bad_url"),
        ("http://[::1", "bad_url"),
        ("http://a.example:99999/", "bad_url"),
        ("file:///etc/passwd", "bad_scheme"),
        ("ftp://example.com/a.jpg", "bad_scheme"),
        ("data:image/png;base64,AAAA", "bad_scheme"),
        ("javascript:alert(1)", "bad_scheme"),
        ("http://127.0.0.1/", "blocked_address"),
        ("http://127.1/", "blocked_address"),
        ("http://2130706433/", "blocked_address"),
        ("http://0x7f000001/", "blocked_address"),
        ("http://0/", "blocked_address"),
        ("http://①②⑦.0.0.1/", "blocked_address"),
        ("http://localhost/", "blocked_address"),
        ("http://127.0.0.1./", "blocked_address"),
        ("http://user@169.254.169.254/latest/meta-data", "blocked_address"),
        ("http://10.0.0.1/", "blocked_address"),
        ("http://[::1]/", "blocked_address"),
        ("http://[::ffff:127.0.0.1]/", "blocked_address"),
        ("http://[fe80::1%25eth0]/", "blocked_address"),
        ("http://[fd00:ec2::254]/", "blocked_address"),
        ("http://224.0.0.1/", "blocked_address"),
    ],
)
def test_urls_that_are_never_asked(url: str, reason: str) -> None:
    (got,) = fetch([url], FetchConfig(backoff=0, timeout=5))
    assert (got.status, got.reason, got.transient, got.http_status) == ("failed", reason, False, None)


def test_a_name_is_judged_by_its_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that looks public and is not; and the checked address is the one connected to, looked up just once."""
    real, looked_up = socket.getaddrinfo, []

    def rebinding(host: str, *rest: Any) -> Any:
        looked_up.append(host)
        return real("127.0.0.1", *rest)

    monkeypatch.setattr("stages.addresses.socket.getaddrinfo", rebinding)
    private, hostile = ask("http://pictures.example:PORT/a", config=replace(QUICK, allow_private_hosts=False))
    assert private[0].reason == "blocked_address" and not hostile.asked
    allowed, hostile = ask("http://pictures.example:PORT/a")
    assert allowed[0].status == "ok" and looked_up == ["pictures.example"] * 2


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.215.14", True),
        ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", True),
        ("64:ff9b::5db8:d70e", True),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("::ffff:10.0.0.1", False),
        ("100.100.100.200", False),
        ("168.63.129.16", False),
        ("192.168.0.1", False),
        ("172.16.5.4", False),
        ("169.254.169.254", False),
        ("0.0.0.0", False),
        ("255.255.255.255", False),
        ("240.0.0.1", False),
        ("ff02::1", False),
        ("::", False),
    ],
)
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert is_public(ipaddress.ip_address(address)) is public


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("file:///etc/passwd", "bad_scheme"),
        ("gopher://127.0.0.1/", "bad_scheme"),
        ("http://10.0.0.1/admin", "blocked_address"),
        ("//[::1]/x", "blocked_address"),
        ("http://localhost:1/", "blocked_address"),
        ("http://[", "bad_url"),
    ],
)
def test_redirects_are_checked_hop_by_hop(location: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first hop counts as public here, whatever is behind it does not."""
    calls = iter([True])
    monkeypatch.setattr("stages.fetch.is_public", lambda address: next(calls, False))
    got = one(f"to?url={location}", replace(QUICK, allow_private_hosts=False))
    assert (got.status, got.reason, got.transient, got.attempts) == ("failed", reason, False, 1)
    assert got.http_status == 302


def test_redirects_are_followed_so_far() -> None:
    assert one("hops?left=4").data == BODY
    assert one("hops?left=5").reason == "too_many_redirects"
    assert one("to?url=/to%3Furl=/to").reason in ("http_5xx", "too_many_redirects")
    assert one("status?code=302").reason == "http_3xx"


def test_a_dripping_body_meets_the_deadline() -> None:
    begun = time.monotonic()
    got = one("drip", replace(QUICK, timeout=0.4, retries=1))
    assert (got.reason, got.transient, got.attempts) == ("timeout", True, 2)
    assert time.monotonic() - begun < 3


def test_a_giant_body_is_not_read_to_its_end() -> None:
    (got, announced), hostile = ask("giant", "picture", config=replace(QUICK, max_bytes=5000, timeout=10))
    assert (got.reason, got.data, got.attempts) == ("too_large", None, 1)
    assert announced.reason == "too_large"
    assert hostile.asked["giant chunks"] < 500  # socket buffers hold some; the rest was never sent


def test_a_packed_body_is_unpacked_up_to_the_limit() -> None:
    (bomb, packed), _ = ask("bomb", "packed", config=replace(QUICK, timeout=10))
    assert (bomb.reason, bomb.data) == ("too_large", None)
    assert packed.data == BODY


def test_bodies_that_are_not_whole() -> None:
    (cut, garbage, empty), hostile = ask("cut", "garbage", "empty")
    assert (cut.reason, cut.transient, hostile.asked["cut"]) == ("cut_body", True, 3)
    assert (garbage.status, garbage.reason) == ("failed", "connection")
    assert (empty.reason, empty.transient, empty.attempts) == ("empty_body", False, 1)


@pytest.mark.parametrize(
    ("code", "reason", "attempts"),
    [(404, "http_404", 1), (403, "http_403", 1), (410, "http_4xx", 1), (503, "http_5xx", 3), (204, "http_2xx", 1)],
)
def test_only_transient_statuses_are_tried_again(code: int, reason: str, attempts: int) -> None:
    got = one(f"status?code={code}")
    assert (got.reason, got.attempts, got.http_status, got.transient) == (reason, attempts, code, attempts > 1)


def test_retry_after_is_kept() -> None:
    begun = time.monotonic()
    got = one("busy?after=1")
    assert (got.status, got.attempts) == ("ok", 2) and time.monotonic() - begun >= 1
    assert one("busy?after=Wed, 21 Oct 2015 07:28:00 GMT").status == "ok"
    assert one("busy?after=nonsense").status == "ok"
    assert one("busy?after=Mon, 01 Jan 99999999999999999999 00:00:00 GMT").status == "ok"


def test_the_threads_that_look_up_names_end_with_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    closed, close = [], CheckedResolver.close
    monkeypatch.setattr(CheckedResolver, "close", lambda self: (closed.append(self), close(self))[1])
    assert one("picture").status == "ok" and len(closed) == 1


def test_who_asks_for_long_patience_is_left_alone() -> None:
    begun = time.monotonic()
    got = one("busy?after=3600")
    assert (got.reason, got.transient, got.attempts) == ("http_429", True, 1) and time.monotonic() - begun < 1


@pytest.mark.parametrize(
    ("tags", "opt_out"),
    [
        (["noai"], "noai"),
        (["NoIndex, noai"], "noai,noindex"),
        (["nofollow", "noimageai"], "noimageai"),
        (["none"], "noindex"),
        (["densebridge: noml"], "noml"),
        (["otherbot: noindex, noai"], ""),
        (["otherbot: nofollow, densebridge: noai"], "noai"),
        (["max-snippet: 50, noai"], "noai"),
        (["unavailable_after: 25 Jun 2030 15:00:00 PST"], ""),
    ],
)
def test_opt_outs_are_honoured_and_recorded(tags: list[str], opt_out: str) -> None:
    path = "robots?" + "&".join(f"tag={t}" for t in tags)
    got = one(path)
    assert got.opt_out == opt_out
    assert (got.status, got.reason) == (("dropped", "opt_out") if opt_out else ("ok", ""))
    assert got.data == (None if opt_out else BODY) and got.attempts == 1
    ignored = one(path, replace(QUICK, opt_out=()))
    assert (ignored.status, ignored.opt_out) == ("ok", opt_out)


def test_text_and_data_mining_reservations() -> None:
    assert (one("tdm").status, one("tdm").opt_out) == ("ok", "tdm-reservation")
    assert one("tdm", replace(QUICK, opt_out=("tdm-reservation",))).status == "dropped"


def test_no_more_than_so_many_at_once() -> None:
    got, hostile = ask(*(f"wait?{n}" for n in range(36)), config=replace(QUICK, per_host=3, timeout=0.5))
    assert hostile.most_in_flight == 3
    assert all(f.status == "ok" for f in got)  # waiting for a slot took longer than the deadline, and did not count


def test_a_silent_host_does_not_hold_up_the_rest() -> None:
    config = replace(QUICK, per_host=4, host_patience=4, timeout=0.5, retries=0)
    got, hostile = ask(*(f"silent?{n}" for n in range(40)), "http://localhost:PORT/a", config=config)
    assert hostile.asked["silent"] < 12
    assert Counter(f.reason for f in got[:-1])["host_down"] > 25
    assert all(f.transient for f in got[:-1]) and got[-1].status == "ok"


def test_nobody_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        (got,) = fetch([f"http://127.0.0.1:{taken.getsockname()[1]}/"], QUICK)
    assert (got.reason, got.transient, got.attempts) == ("connection", True, 3)


def test_names_that_do_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    monkeypatch.setattr("stages.addresses.socket.getaddrinfo", gone)
    (got,) = fetch(["http://gone.example/"], QUICK)
    assert (got.reason, got.transient, got.attempts) == ("dns", False, 1)


@pytest.mark.parametrize(
    "wrong",
    [{"timeout": 0}, {"retries": -1}, {"user_agent": "two\nlines"}, {"opt_out": "noai"}, {"opt_out": ("NoAI",)}],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"fetch: {next(iter(wrong))} must"):
        FetchConfig(**wrong)
