"""The fetcher against a server that means harm, and against the shapes server that has ordinary bad days."""

from __future__ import annotations

import asyncio
import gzip
import socket
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from aiohttp import web

from stages.addresses import CheckedResolver
from stages.fetch import FetchConfig, Fetched, Fetcher, fetch
from stages.opt_out import HEEDED
from tests.web_server import serve_app

PUBLIC = FetchConfig(
    user_agent="densebridge/0.1 (+me@example.org)", timeout=20.0, backoff=0.01, max_bytes=1 << 20, per_host_rate=2000.0
)
QUICK = replace(PUBLIC, allow_private_hosts=True)
BODY = bytes(range(256)) * 40


class Hostile:
    """Handlers by name; counts what was asked and how many requests were in flight at most."""

    def __init__(self, robots: str | int = 404) -> None:
        self.robots = robots
        self.asked: Counter[str] = Counter()
        self.headers: list[dict[str, str]] = []
        self.connections: set[Any] = set()
        self.in_flight = self.most_in_flight = 0

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/robots.txt", self.rules)
        app.router.add_get("/{name}", self.answer)
        return app

    async def rules(self, request: web.Request) -> web.StreamResponse:
        self.asked["/robots.txt"] += 1
        self.connections.add(request.transport.get_extra_info("peername") if request.transport else None)
        if isinstance(self.robots, int):
            return web.Response(status=self.robots)
        if self.robots.startswith("/"):
            return web.Response(status=301, headers={"Location": self.robots})
        return web.Response(text=self.robots)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        self.asked[name] += 1
        self.headers.append(dict(request.headers))
        self.connections.add(request.transport.get_extra_info("peername") if request.transport else None)
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

    async def on_tagged(self, request: web.Request) -> web.StreamResponse:
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


def ask(*paths: str, config: FetchConfig = QUICK, robots: str | int = 404) -> tuple[list[Fetched], Hostile]:
    """What the fetcher makes of these paths of a hostile server; a path that begins with http is a URL as it is."""
    hostile = Hostile(robots)
    with serve_app(hostile.app()) as port:
        return fetch([at(port, path) for path in paths], config), hostile


def at(port: int, path: str) -> str:
    return path.replace("PORT", str(port)) if path.startswith("http://") else f"http://127.0.0.1:{port}/{path}"


def one(path: str, config: FetchConfig = QUICK) -> Fetched:
    (fetched,), _ = ask(path, config=config)
    return fetched


def test_a_plain_body() -> None:
    got = one("picture")
    assert (got.status, got.reason, got.data, got.http_status) == ("ok", "", BODY, 200)
    assert (got.attempts, got.transient, got.directives, got.content_type) == (1, False, "", "image/x-test")


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
    (got,) = fetch([url], PUBLIC)
    assert (got.status, got.reason, got.transient, got.http_status) == ("failed", reason, False, None)


def test_a_name_is_judged_by_its_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that looks public and is not; and the checked address is the one connected to, looked up just once."""
    real, looked_up = socket.getaddrinfo, []

    def rebinding(host: str, *rest: Any) -> Any:
        looked_up.append(host)
        return real("127.0.0.1", *rest)

    monkeypatch.setattr("stages.addresses.socket.getaddrinfo", rebinding)
    private, hostile = ask("http://pictures.example:PORT/a", config=PUBLIC)
    assert private[0].reason == "blocked_address" and not hostile.asked
    allowed, hostile = ask("http://pictures.example:PORT/a")
    assert allowed[0].status == "ok" and looked_up == ["pictures.example"] * 2


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("file:///etc/passwd", "bad_scheme"),
        ("gopher://127.0.0.1/", "bad_scheme"),
        ("http://10.0.0.1/admin", "blocked_address"),
        ("//[::1]/x", "blocked_address"),
        ("http://127.0.0.2:8000/", "blocked_address"),
        ("http://me:secret@169.254.169.254/latest/meta-data", "blocked_address"),
        ("http://127.0.0.1:25/", "bad_port"),
        ("http://[", "bad_url"),
    ],
)
def test_redirects_are_checked_hop_by_hop(location: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's own address counts as public here, whatever else is behind it does not."""
    monkeypatch.setattr("stages.addresses.is_public", lambda address: str(address) == "127.0.0.1")
    got = one(f"to?url={location}", PUBLIC)
    assert (got.status, got.reason, got.transient, got.attempts) == ("failed", reason, False, 1)
    assert got.http_status == 302


def test_redirects_are_followed_so_far() -> None:
    assert one("hops?left=4").data == BODY
    assert one("hops?left=5").reason == "too_many_redirects"
    assert one("to?url=/to%3Furl=/to").reason in ("http_5xx", "too_many_redirects")
    assert one("status?code=302").reason == "http_3xx"


def test_a_dripping_body_meets_the_deadline() -> None:
    got = one("drip", replace(QUICK, timeout=0.4, retries=1))
    assert (got.reason, got.transient, got.attempts) == ("timeout", True, 2)


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
    assert (garbage.status, garbage.reason, garbage.attempts) == ("failed", "bad_answer", 1)
    assert (empty.reason, empty.transient, empty.attempts) == ("empty_body", False, 1)


@pytest.mark.parametrize(
    ("code", "reason", "attempts"),
    [(404, "http_404", 1), (403, "http_403", 1), (410, "http_4xx", 1), (503, "http_5xx", 3), (204, "http_2xx", 1)],
)
def test_only_transient_statuses_are_tried_again(code: int, reason: str, attempts: int) -> None:
    got = one(f"status?code={code}")
    assert (got.reason, got.attempts, got.http_status, got.transient) == (reason, attempts, code, attempts > 1)


@pytest.mark.parametrize(
    "after", ["1", "Wed, 21 Oct 2015 07:28:00 GMT", "nonsense", "Mon, 01 Jan 99999999999999999999 00:00:00 GMT"]
)
def test_whoever_is_busy_is_asked_again(after: str) -> None:
    got = one(f"busy?after={after}")
    assert (got.status, got.attempts, got.http_status) == ("ok", 2, 200)


def test_the_threads_that_look_up_names_end_with_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    closed, close = [], CheckedResolver.close
    monkeypatch.setattr(CheckedResolver, "close", lambda self: (closed.append(self), close(self))[1])
    assert one("picture").status == "ok" and len(closed) == 1


def test_who_asks_for_long_patience_is_left_alone_with_all_its_pictures() -> None:
    hostile = Hostile()
    with serve_app(hostile.app()) as port, Fetcher(QUICK) as fetcher:
        (busy,) = fetcher.fetch([at(port, "busy?after=3600")])
        (other,) = fetcher.fetch([at(port, "picture")])
    assert (busy.reason, busy.transient, busy.attempts) == ("http_429", True, 1)
    assert (other.reason, other.transient, other.attempts, other.http_status) == ("host_busy", True, 0, None)
    assert hostile.asked["picture"] == 0


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
    path = "tagged?" + "&".join(f"tag={t}" for t in tags)
    got = one(path)
    assert got.directives == opt_out
    assert (got.status, got.reason) == (("dropped", "opt_out") if opt_out else ("ok", ""))
    assert got.data == (None if opt_out else BODY) and got.attempts == 1
    ignored = one(path, replace(QUICK, opt_out=()))
    assert (ignored.status, ignored.directives) == ("ok", opt_out)


def test_text_and_data_mining_reservations() -> None:
    assert (one("tdm").status, one("tdm").directives) == ("dropped", "tdm-reservation")
    assert one("tdm", replace(QUICK, opt_out=("noai",))).status == "ok"


def test_no_more_than_so_many_at_once() -> None:
    got, hostile = ask(*(f"wait?{n}" for n in range(36)), config=replace(QUICK, per_host=3, timeout=0.5))
    assert hostile.most_in_flight == 3
    assert all(f.status == "ok" for f in got)  # waiting for a slot took longer than the deadline, and did not count


def test_a_silent_host_does_not_hold_up_the_rest() -> None:
    config = replace(QUICK, per_host=4, host_patience=4, timeout=1.0, retries=0)
    got, hostile = ask(*(f"silent?{n}" for n in range(40)), "http://localhost:PORT/a", config=config)
    assert hostile.asked["silent"] < 12
    assert Counter(f.reason for f in got[:-1])["host_down"] > 25
    assert all(f.transient for f in got[:-1]) and got[-1].status == "ok"


def test_nobody_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/"
        ((got,), (alone,)) = fetch([url], QUICK), fetch([url], replace(QUICK, site_files=()))
    assert (got.reason, got.transient, got.attempts) == ("connection", True, 0)  # its robots.txt was tried three times
    assert (alone.reason, alone.transient, alone.attempts) == ("connection", True, 3)


def test_names_that_do_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up = []

    def gone(host: str, *_: Any) -> Any:
        looked_up.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    monkeypatch.setattr("stages.addresses.socket.getaddrinfo", gone)
    got = fetch([f"http://gone.example/{n}" for n in range(20)], QUICK)
    assert {(f.reason, f.transient, f.attempts) for f in got} == {("dns", False, 0)} and looked_up == ["gone.example"]


def test_name_servers_that_hang_hold_up_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    real, released = socket.getaddrinfo, threading.Event()

    def hanging(host: str, *rest: Any) -> Any:
        if host.startswith("hang"):
            released.wait(30)
        return real("127.0.0.1", *rest)

    monkeypatch.setattr("stages.addresses.socket.getaddrinfo", hanging)
    urls = [f"http://hang{n}.example:PORT/a" for n in range(30)]
    try:
        got, hostile = ask(*urls, "http://pictures.example:PORT/b", config=replace(QUICK, timeout=1.0, retries=0))
    finally:
        released.set()
    assert {(f.reason, f.transient) for f in got[:-1]} == {("timeout", True)} and not hostile.asked["a"]
    assert got[-1].status == "ok"


# -- batches -----------------------------------------------------------------------------------------------------------


def test_bodies_are_taken_as_they_come_and_no_more_than_can_be_worked_on() -> None:
    held = most = 0

    async def work(got: Fetched) -> tuple[str, int]:
        nonlocal held, most
        held += 1
        most = max(most, held)
        while most < 4:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)
        held -= 1
        return got.url.rpartition("?")[2], len(got.data or b"")

    hostile = Hostile()
    with serve_app(hostile.app()) as port:
        got = fetch([at(port, f"fast?{n}") for n in range(20)], replace(QUICK, concurrency=4), work)
    assert got == [(str(n), len(BODY)) for n in range(20)] and most == 4


def test_a_batch_that_breaks_off_leaves_nothing_behind() -> None:
    worked_on = []

    async def broken(got: Fetched) -> None:
        worked_on.append(got.url)
        raise RuntimeError(got.reason)

    with serve_app(Hostile().app()) as port, Fetcher(replace(QUICK, concurrency=2)) as fetcher:
        for _ in range(3):
            with pytest.raises(RuntimeError):
                fetcher.fetch([at(port, f"wait?{n}") for n in range(9)], broken)
        before = len(worked_on)
        got = fetcher.fetch([at(port, f"picture?{n}") for n in range(9)])
    assert {f.status for f in got} == {"ok"} and len(worked_on) == before < 27


# -- robots.txt --------------------------------------------------------------------------------------------------------

SHUT = "User-agent: densebridge\nDisallow: /a\n\nUser-agent: *\nDisallow: /"


def test_robots_txt_is_asked_once_and_heeded() -> None:
    hostile = Hostile(SHUT)
    with serve_app(hostile.app()) as port, Fetcher(replace(QUICK, concurrency=1)) as fetcher:
        first = fetcher.fetch([at(port, path) for path in ("a", "b", "about", "%61")])
        (second,) = fetcher.fetch([at(port, "c")])
    assert [(f.status, f.reason, f.directives) for f in first] == [
        ("dropped", "opt_out", "robots-disallow"),
        ("ok", "", ""),
        ("dropped", "opt_out", "robots-disallow"),
        ("dropped", "opt_out", "robots-disallow"),
    ]
    assert (first[0].attempts, first[0].http_status, second.status) == (0, None, "ok")
    assert hostile.asked == {"/robots.txt": 1, "b": 1, "c": 1}
    assert len(hostile.connections) == 1  # the connection outlives the batch too


def test_robots_txt_is_recorded_where_it_is_not_heeded() -> None:
    policy = tuple(d for d in HEEDED if d != "robots-disallow")
    (got,), _ = ask("a", config=replace(QUICK, opt_out=policy), robots=SHUT)
    assert (got.status, got.directives, got.attempts) == ("ok", "robots-disallow", 1)
    (down,), _ = ask("a", config=replace(QUICK, opt_out=policy), robots=500)
    assert (down.status, down.directives) == ("ok", "robots-unreachable")
    (got,), hostile = ask("a", config=replace(QUICK, site_files=()), robots=SHUT)
    assert (got.status, got.directives, hostile.asked["/robots.txt"]) == ("ok", "", 0)


@pytest.mark.parametrize(
    ("robots", "reason"),
    [
        (404, ""),
        (401, ""),
        (204, ""),
        (503, "robots_unreachable"),
        (429, "robots_unreachable"),
        ("/hops?left=9", ""),  # without end, which is as good as not there
        ("/to?url=/shut", "opt_out"),
        ("/to?url=file:///etc/passwd", "robots_unreachable"),
        ("\x00\udcff not a word of it" * 100_000, ""),
        ("#" * 600_000 + "\nUser-agent: *\nDisallow: /", ""),  # beyond what is read
        ("User-agent: *\nContent-Signal: search=yes, ai-train=no", "opt_out"),
        ("User-agent: *\nCrawl-delay: 3600", ""),
    ],
)
def test_robots_txt_that_is_not_what_it_should_be(
    robots: str | int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def shut(*_: object) -> web.Response:
        return web.Response(text="User-agent: *\nDisallow: /")

    monkeypatch.setattr(Hostile, "on_shut", shut, raising=False)
    text = robots.encode(errors="replace").decode() if isinstance(robots, str) else robots
    (got,), hostile = ask("picture", robots=text)
    assert got.reason == reason and hostile.asked["picture"] == (not reason)
    assert got.transient == (robots in (503, 429))
    assert hostile.asked["/robots.txt"] == (3 if robots in (503, 429) else 1)


def test_a_crawl_delay_is_the_pace() -> None:
    got, hostile = ask(*(f"wait?{n}" for n in range(8)), robots="User-agent: *\nCrawl-delay: 3600")
    assert Counter(f.reason for f in got) == {"": 1, "host_busy": 7} and hostile.asked["wait"] == 1


def test_the_robots_txt_of_where_a_redirect_leads_is_heeded() -> None:
    other = Hostile(SHUT)
    with serve_app(other.app()) as port:
        got = one(f"to?url=http://localhost:{port}/a")
    assert (got.status, got.directives, got.http_status) == ("dropped", "robots-disallow", 302)
    assert other.asked == {"/robots.txt": 1}


def test_other_files_of_a_site_are_asked_for_if_wished(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ai(*_: object) -> web.Response:
        return web.Response(text="User-Agent: *\nDisallow: *.jpg\nAllow: /")

    monkeypatch.setattr(Hostile, "on_ai.txt", ai, raising=False)
    config = replace(QUICK, site_files=("ai.txt", "tdmrep.json"), opt_out=())
    got, hostile = ask("a.jpg", "b.png", config=config)
    assert [f.directives for f in got] == ["ai-txt-disallow", ""]
    assert hostile.asked["ai.txt"] == 1 and hostile.asked["/robots.txt"] == 0


# -- conditional requests ----------------------------------------------------------------------------------------------


def test_what_has_not_changed_is_not_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = {"ETag": '"v1"', "Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"}

    async def dated(_: Hostile, request: web.Request) -> web.Response:
        same = request.headers.get("If-None-Match") == '"v1"' or "If-Modified-Since" in request.headers
        return web.Response(status=304, headers=sent) if same else web.Response(body=BODY, headers=sent)

    monkeypatch.setattr(Hostile, "on_dated", dated, raising=False)
    hostile = Hostile()
    with serve_app(hostile.app()) as port, Fetcher(QUICK) as fetcher:
        url = at(port, "dated")
        (first,) = fetcher.fetch([url])
        (second,) = fetcher.fetch([url], conditions={url: (first.etag, first.last_modified)})
        (third,) = fetcher.fetch([url], conditions={url: (None, first.last_modified)})
        (fourth,) = fetcher.fetch([url], conditions={url: ('"v0"', None)})
        (fifth,) = fetcher.fetch([url], conditions={url: ("no etag\r\nX: y", "no date")})
    assert (first.status, first.etag, first.last_modified) == ("ok", *sent.values())
    for unchanged in (second, third):
        assert (unchanged.status, unchanged.reason, unchanged.data, unchanged.http_status) == (
            "unchanged",
            "",
            None,
            304,
        )
        assert (unchanged.etag, unchanged.last_modified) == tuple(sent.values())
    assert fourth.data == fifth.data == BODY
    assert "X" not in hostile.headers[-1]


def test_nobody_is_unchanged_who_was_not_asked() -> None:
    assert (one("status?code=304").status, one("status?code=304").reason) == ("failed", "http_3xx")
