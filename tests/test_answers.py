"""Every answer a server may give ends as one typed row, and neither the batch nor the memory suffers from it."""

from __future__ import annotations

import asyncio
import ssl
import tracemalloc
from collections.abc import Iterator
from datetime import UTC, datetime
from urllib.parse import quote, unquote

import pytest
import trustme

from stages.answers import Stopped, date_of, etag_of, retry_after, status_stop, stop_of
from stages.fetch import FetchConfig, Fetched, Fetcher, fetch
from tests.hostile_answers import ANSWERS, BODY, MAX_BYTES, http
from tests.web_server import serve_raw

CONFIG = FetchConfig(
    user_agent="densebridge/0.1 (+me@example.org)",
    timeout=3.0,
    retries=0,
    max_bytes=MAX_BYTES,
    concurrency=200,
    per_host=200,
    per_host_rate=1e6,
    host_patience=1000,
)


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """The answer that the path names; a good one for any other, and a second one behind it that nobody asked for."""
    try:
        while head := await reader.readuntil(b"\r\n\r\n"):
            name = unquote(head.split(b" ")[1].decode()).removeprefix("/")
            if name == "robots.txt":
                writer.write(http(b"", status="404 Not Found", kept=True))
            elif name not in ANSWERS:
                more = http(b"not what you asked for", kept=True) if name == "polluted" else b""
                writer.write(http(BODY, "Content-Type: image/x-test", kept=True) + more)
            else:
                given = ANSWERS[name][0]
                await (given(writer) if callable(given) else _write(writer, given))
                break
            await writer.drain()
    except (OSError, asyncio.IncompleteReadError):
        pass
    finally:
        writer.close()


async def _write(writer: asyncio.StreamWriter, given: bytes) -> None:
    writer.write(given)
    await writer.drain()


@pytest.fixture(scope="module")
def here() -> Iterator[None]:
    """Makes this machine's address count as public, so that all others that are not can be told from it."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("stages.addresses.is_public", lambda address: str(address) == "127.0.0.1")
        yield


@pytest.fixture(scope="module")
def port(here: None) -> Iterator[int]:
    with serve_raw(answer) as port:
        yield port


@pytest.fixture(scope="module")
def fetched(port: int) -> dict[str, Fetched]:
    """All answers, asked for in one batch, with good ones between and behind."""
    names = ["first", *ANSWERS, "last"]
    with Fetcher(CONFIG) as fetcher:
        got = dict(zip(names, fetcher.fetch([url(port, name) for name in names]), strict=True))
        later = fetcher.fetch([url(port, "later")])[0]
    return {**got, "later": later}


def url(port: int, name: str) -> str:
    return f"http://127.0.0.1:{port}/{quote(name)}"


@pytest.mark.parametrize("name", ANSWERS)
def test_every_answer_ends_as_one_typed_row(fetched: dict[str, Fetched], name: str) -> None:
    got, reasons = fetched[name], ANSWERS[name][1].split("|")
    assert got.reason in reasons and got.status == ("failed" if got.reason else "ok")
    assert (got.data is not None) == (got.status == "ok") and got.attempts == 1
    assert got.transient == (got.reason in ("connection", "cut_body", "timeout", "http_5xx"))


@pytest.mark.parametrize("name", ["first", "last", "later"])
def test_good_answers_are_not_harmed(fetched: dict[str, Fetched], name: str) -> None:
    assert (fetched[name].status, fetched[name].data) == ("ok", BODY)


def test_there_are_many_kinds_of_harm() -> None:
    assert len(ANSWERS) >= 90


def test_what_is_taken_is_what_was_sent(fetched: dict[str, Fetched]) -> None:
    for name in ("packed unasked", "packed with zlib", "hints first", "cookies"):
        assert fetched[name].data == BODY, name
    assert fetched["a web page"].content_type == "text/html"


def test_an_answer_nobody_asked_for_is_nobodys(port: int) -> None:
    with Fetcher(CONFIG) as fetcher:
        for path in ("polluted", "polluted", "after"):
            (got,) = fetcher.fetch([f"http://127.0.0.1:{port}/{path}"])
            assert got.data == BODY


def test_memory_stays_capped(here: None) -> None:
    """Twenty bodies of at least 200 MB each, sent as fast as they are taken."""
    sent = 0

    async def pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        if b"/robots.txt" in await reader.readuntil(b"\r\n\r\n"):
            writer.write(http(b"", status="404 Not Found"))
        else:
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            for _ in range(200 << 4):
                writer.write(bytes(1 << 16))
                await writer.drain()
                sent += 1 << 16
        writer.close()

    with serve_raw(pour) as port:
        tracemalloc.start()
        got = fetch([f"http://127.0.0.1:{port}/{n}" for n in range(20)], CONFIG)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert {f.reason for f in got} == {"too_large"}
    assert most < 40 << 20 and sent < 400 << 20  # both ends are in this process, with their buffers


# -- TLS ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("none", ""), ("its own", "tls"), ("another host's", "tls"), ("expired", "tls")],
)
def test_certificates_are_checked(here: None, fault: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    authority, stranger = trustme.CA(), trustme.CA()
    trusted = ssl.create_default_context()
    authority.configure_trust(trusted)
    monkeypatch.setattr("aiohttp.connector._SSL_CONTEXT_VERIFIED", trusted)
    name = "other.example" if fault == "another host's" else "127.0.0.1"
    expiry = datetime(2020, 1, 1, tzinfo=UTC) if fault == "expired" else None
    issuer = stranger if fault == "its own" else authority
    served = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    issuer.issue_cert(name, not_after=expiry).configure_cert(served)
    with serve_raw(answer, served) as port:
        (got,) = fetch([f"https://127.0.0.1:{port}/picture"], CONFIG)
    assert (got.reason, got.transient) == (reason, False)


def test_nobody_speaks_tls_there(here: None) -> None:
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(http(b"", status="400 Bad Request"))
        await reader.read(100)
        writer.close()

    with serve_raw(speak) as port:
        (got,) = fetch([f"https://127.0.0.1:{port}/picture"], CONFIG)
    assert (got.reason, got.transient) == ("tls", False)


def test_a_handshake_that_never_ends(here: None) -> None:
    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(60)

    with serve_raw(wait) as port:
        (got,) = fetch([f"https://127.0.0.1:{port}/picture"], CONFIG)
    assert (got.reason, got.transient) == ("timeout", True)


# -- headers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("3", 3.0), ("9" * 400, 86_400.0), ("-1", None), ("soon", None), ("", None), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
     ("Wed, 21 Oct 2115 07:28:00 GMT", 86_400.0), ("Wed, 21 Oct 2015 07:28:00", None), ("²", None)],
)  # fmt: skip
def test_how_long_to_wait(value: str, seconds: float | None) -> None:
    assert retry_after(value) == seconds


@pytest.mark.parametrize("etag", ['"a"', 'W/"a-1"', '""'])
def test_etags_worth_keeping(etag: str) -> None:
    assert etag_of(etag) == etag


@pytest.mark.parametrize(
    "etag", [None, "", "a", '"a', '"a"b"', '"a\n"', '"' + "a" * 300 + '"', '"ü"', 'w/"a"', '"a"\r\n']
)
def test_etags_not_worth_keeping(etag: str | None) -> None:
    assert etag_of(etag) == ""


def test_dates_worth_keeping() -> None:
    date = "Wed, 21 Oct 2015 07:28:00 GMT"
    assert date_of(date) == date
    assert [date_of(d) for d in (None, "", "yesterday", date + "\r\nX: y", "1 " * 40, "Wed, ٢١ Oct 2015")] == [""] * 6


def test_statuses_and_faults_have_short_names() -> None:
    assert [status_stop(s).reason for s in (403, 404, 429, 418, 503, 204, 999)] == [
        "http_403", "http_404", "http_429", "http_4xx", "http_5xx", "http_2xx", "http_9xx"
    ]  # fmt: skip
    stopped = Stopped("timeout", transient=True)
    assert stop_of(stopped) is stopped
    assert (stop_of(RuntimeError("?")).reason, stop_of(OSError()).reason) == ("unexpected", "connection")
