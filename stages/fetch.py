"""Fetches URLs that strangers wrote: safely (public addresses only, bounded bytes and seconds) and politely.

A library of the download stage: it knows neither tables nor pictures. Nothing here raises for a URL's sake; every URL
ends as one `Fetched` with a reason from a short list. What it guards against is in the tests, hop by hop.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import socket
import ssl
import time
import zlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal

import aiohttp
from yarl import URL

from .addresses import BlockedAddress, CheckedResolver, is_public, literal_address

OPT_OUT_DIRECTIVES = ("noai", "noimageai", "noindex", "noimageindex", "noml")
_REDIRECTS = (301, 302, 303, 307, 308)
_NAMED_STATUSES = (403, 404, 429)
_CHUNK = 1 << 16
# Directives of X-Robots-Tag that hold a colon themselves, so that what is before it is not a crawler's name.
_VALUED_DIRECTIVES = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """How to ask for a URL, and when to give up."""

    user_agent: str = "densebridge/0.1 (+contact in the recipe)"
    """What we call ourselves. Say who you are: the first word (up to "/") is the name that opt-outs can address."""
    timeout: float = 10.0
    """Seconds that one try may take in all, redirects and body included; waiting for a free slot does not count."""
    connect_timeout: float = 5.0
    """Seconds to open a connection, TLS included."""
    max_bytes: int = 32 << 20
    """A body longer than this is not read to its end."""
    max_redirects: int = 5
    """Redirects followed; each one's address is checked like the first."""
    retries: int = 2
    """Further tries after a transient failure: connection, timeout, cut body, 429, 5xx, a name server that is busy."""
    backoff: float = 0.5
    """Seconds before the first retry; doubled each time, times 0.5 to 1.5 as the URL's digest says."""
    max_retry_after: float = 30.0
    """A server's Retry-After is kept up to these seconds. Who asks for longer is left alone: no further try now."""
    concurrency: int = 64
    """Requests in flight."""
    per_host: int = 8
    """Requests in flight to one host."""
    host_patience: int = 32
    """After so many failures to get any answer from a host, one after the other, its remaining URLs are not tried."""
    allow_private_hosts: bool = False
    """Whether private, loopback and link-local addresses may be asked. For tests and intranets only."""
    opt_out: tuple[str, ...] = OPT_OUT_DIRECTIVES
    """Directives of X-Robots-Tag that drop a URL ("tdm-reservation" works too); empty to only record them."""

    def __post_init__(self) -> None:
        for name in ("timeout", "connect_timeout", "max_bytes", "concurrency", "per_host", "host_patience"):
            if getattr(self, name) <= 0:
                raise ValueError(f"fetch: {name} must be above 0, got {getattr(self, name)}")
        for name in ("max_redirects", "retries", "backoff", "max_retry_after"):
            if getattr(self, name) < 0:
                raise ValueError(f"fetch: {name} must not be negative, got {getattr(self, name)}")
        if not self.user_agent.strip() or not self.user_agent.isprintable() or not self.user_agent.isascii():
            raise ValueError(f"fetch: user_agent must be one line of plain ASCII, got {self.user_agent!r}")
        if isinstance(self.opt_out, str) or any(d != d.strip().lower() or not d for d in self.opt_out):
            raise ValueError(f"fetch: opt_out must be a tuple of lower-case directives, got {self.opt_out!r}")


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """What became of one URL."""

    url: str
    status: Literal["ok", "failed", "dropped"]
    reason: str = ""
    """Why not: bad_url, bad_scheme, blocked_address, dns, connection, tls, timeout, http_403, http_404, http_429,
    http_4xx, http_5xx (http_2xx, http_3xx: an answer without a body of its own), too_many_redirects, too_large,
    opt_out, empty_body, cut_body, host_down, unexpected. Empty where status is ok."""
    data: bytes | None = None
    """The body, only where status is ok."""
    http_status: int | None = None
    """Of the last answer, None when there was none."""
    attempts: int = 0
    transient: bool = False
    """Whether another run may well have more luck."""
    opt_out: str = ""
    """Opt-out directives seen that address us, sorted, with commas between; recorded whether honoured or not."""
    content_type: str = ""
    """As the server said it, which is often wrong."""


Then = Callable[[Fetched], Awaitable[Any]]


def fetch(urls: Sequence[str], config: FetchConfig, then: Then | None = None) -> list[Any]:
    """`fetch_all` for callers without an event loop."""
    return asyncio.run(fetch_all(urls, config, then))


async def fetch_all(urls: Sequence[str], config: FetchConfig, then: Then | None = None) -> list[Any]:
    """One `Fetched` per URL, in the order given; a URL that is named twice is asked for once. With `then` what it makes of
    each instead: it is called as soon as that URL is there, and its body is not held any longer.

    Else all bodies are held in memory together (up to len(urls) * max_bytes), so call it with a few hundred URLs at a time.
    """
    unique = list(dict.fromkeys(urls))
    resolver = CheckedResolver(allow_private_hosts=config.allow_private_hosts, threads=min(config.concurrency, 64))
    # The connector's own limits are off: waiting in them would count towards a try's deadline.
    connector = aiohttp.TCPConnector(limit=0, resolver=resolver, ttl_dns_cache=300)
    session = aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
        auto_decompress=False,  # a small gzip body can hold gigabytes; _unpack stops at max_bytes
        headers={"User-Agent": config.user_agent, "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"},
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=config.connect_timeout),
    )

    async def finish(url: str) -> Any:
        fetched = await fetcher.fetch(url)
        return fetched if then is None else await then(fetched)

    try:
        async with session:
            fetcher = _Fetcher(config, session)
            answers = await asyncio.gather(*(finish(url) for url in unique))
    finally:
        await resolver.close()  # aiohttp closes only resolvers that it made itself
    by_url = dict(zip(unique, answers, strict=True))
    return [by_url[url] for url in urls]


class _Stopped(Exception):
    """A try that ended without a body."""

    def __init__(self, reason: str, *, transient: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.transient = reason, transient


class _Host:
    """What we know of one host: its slots, and for how many tries on end it has not answered."""

    def __init__(self, slots: int) -> None:
        self.slots = asyncio.Semaphore(slots)
        self.silent = 0


@dataclass(kw_only=True)
class _Seen:
    """What the answers of one try said, kept also when the try fails."""

    http_status: int | None = None
    content_type: str = ""
    silent_host: _Host | None = None  # asked, and has not answered yet
    directives: set[str] = field(default_factory=set)
    retry_after: float | None = None


class _Fetcher:
    """One `fetch_all` call: its session, its slots, its hosts."""

    def __init__(self, config: FetchConfig, session: aiohttp.ClientSession) -> None:
        self._config, self._session = config, session
        self._slots = asyncio.Semaphore(config.concurrency)
        self._hosts: dict[str, _Host] = {}
        self._agent = config.user_agent.split("/")[0].split()[0].lower()

    async def fetch(self, url: str) -> Fetched:
        """`url` with its retries. Sleeps hold no slot."""
        for attempt in range(1, self._config.retries + 2):
            fetched, retry_after = await self._try(url)
            fetched = replace(fetched, attempts=attempt - (fetched.reason == "host_down"))
            too_long = retry_after is not None and retry_after > self._config.max_retry_after
            if not fetched.transient or fetched.reason == "host_down" or too_long or attempt > self._config.retries:
                break
            await asyncio.sleep(max(retry_after or 0.0, _pause(url, attempt, self._config.backoff)))
        return fetched

    async def _try(self, url: str) -> tuple[Fetched, float | None]:
        seen, data, reason, transient = _Seen(), None, "", False
        try:
            data = await self._follow(url, seen)
        except Exception as error:  # a hostile answer must cost its own row only, never the partition
            reason, transient = _reason_of(error)
            if reason == "unexpected":
                log.warning("fetch: unexpected %s for %s", type(error).__name__, url, exc_info=error)
            if seen.silent_host is not None and transient:
                seen.silent_host.silent += 1
        fetched = Fetched(
            url=url,
            status="ok" if data is not None else "dropped" if reason == "opt_out" else "failed",
            reason=reason,
            data=data,
            http_status=seen.http_status,
            transient=transient,
            opt_out=",".join(sorted(seen.directives)),
            content_type=seen.content_type,
        )
        return fetched, seen.retry_after

    async def _follow(self, url: str, seen: _Seen) -> bytes:
        """The body at the end of the redirects. The deadline runs only while a slot is held."""
        target, left = self._checked(url), self._config.timeout
        for _ in range(self._config.max_redirects + 1):
            host = self._hosts.setdefault(target.raw_host or "", _Host(self._config.per_host))
            async with host.slots, self._slots:  # the host's slot first: a slow host must not sit on the common ones
                if host.silent >= self._config.host_patience:
                    raise _Stopped("host_down", transient=True)
                begun = time.monotonic()
                seen.silent_host = host
                async with asyncio.timeout(left):
                    answer = await self._ask(target, seen)
                left -= time.monotonic() - begun
            if isinstance(answer, bytes):
                return answer
            target = answer
        raise _Stopped("too_many_redirects")

    async def _ask(self, target: URL, seen: _Seen) -> bytes | URL:
        """One request: the body, or where the redirect points."""
        async with self._session.get(target, allow_redirects=False) as response:
            if seen.silent_host is not None:
                seen.silent_host.silent, seen.silent_host = 0, None
            seen.http_status, seen.content_type = response.status, response.headers.get("Content-Type", "")[:100]
            seen.directives |= _directives(response, self._agent, self._config.opt_out)
            seen.retry_after = _retry_after(response.headers.get("Retry-After", ""))
            location = response.headers.get("Location") if response.status in _REDIRECTS else None
            if response.status != 200 and not location:
                named = response.status in _NAMED_STATUSES
                reason = f"http_{response.status}" if named else f"http_{response.status // 100}xx"
                raise _Stopped(reason, transient=response.status == 429 or response.status >= 500)
            if seen.directives & set(self._config.opt_out):
                raise _Stopped("opt_out")
            if location:
                return self._checked(location, base=target)
            return await _read(response, self._config.max_bytes)

    def _checked(self, text: str, base: URL | None = None) -> URL:
        """The URL to ask, if it may be asked. Names are checked when they are resolved, literal addresses here."""
        try:
            url = URL(text.strip()) if base is None else base.join(URL(text.strip()))
            host = url.raw_host or ""  # as it will be connected to: lower case, IDNA, no brackets
        except (ValueError, TypeError, AttributeError):
            raise _Stopped("bad_url") from None
        if url.scheme not in ("http", "https"):
            raise _Stopped("bad_scheme" if url.scheme else "bad_url")
        if not host:
            raise _Stopped("bad_url")
        address = literal_address(host.rstrip("."))
        if address is not None and not self._config.allow_private_hosts and not is_public(address):
            raise _Stopped("blocked_address")
        return url


async def _read(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    """The body, at most `max_bytes` of it in memory. aiohttp compares it with Content-Length (ClientPayloadError)."""
    if (response.content_length or 0) > max_bytes:
        raise _Stopped("too_large")
    body = bytearray()
    async for chunk in response.content.iter_chunked(_CHUNK):
        if len(body) + len(chunk) > max_bytes:
            raise _Stopped("too_large")
        body += chunk
    if response.headers.get("Content-Encoding", "").lower() in ("gzip", "x-gzip", "deflate"):
        return _unpack(bytes(body), max_bytes)  # asked for or not, some servers pack everything
    if not body:
        raise _Stopped("empty_body")
    return bytes(body)


def _unpack(body: bytes, max_bytes: int) -> bytes:
    """The gzip or zlib body, never more than `max_bytes` + 1 of it in memory. Raises zlib.error when it is neither."""
    inflater = zlib.decompressobj(wbits=32 + zlib.MAX_WBITS)
    data = inflater.decompress(body, max_bytes + 1)
    if len(data) > max_bytes:
        raise _Stopped("too_large")
    if not inflater.eof:
        raise _Stopped("cut_body", transient=True)
    return data


def _reason_of(error: Exception) -> tuple[str, bool]:
    """(reason, whether it is transient) of what a try raised. The order matters: aiohttp's errors inherit crosswise."""
    if isinstance(error, _Stopped):
        return error.reason, error.transient
    if isinstance(error, BlockedAddress):
        return "blocked_address", False
    if isinstance(error, TimeoutError):
        return "timeout", True
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "dns", error.os_error.errno == socket.EAI_AGAIN  # the name server is busy; else the name is gone
    if isinstance(error, (aiohttp.ClientPayloadError, zlib.error)):
        return "cut_body", True
    if isinstance(error, (aiohttp.ClientSSLError, ssl.SSLError, ssl.CertificateError)):
        return "tls", False
    if isinstance(error, (aiohttp.InvalidURL, UnicodeError)):
        return "bad_url", False
    if isinstance(error, (aiohttp.ClientError, OSError, EOFError)):
        return "connection", True
    return "unexpected", False


def _directives(response: aiohttp.ClientResponse, agent: str, honoured: tuple[str, ...]) -> set[str]:
    """Opt-out directives that address everyone or us by name, of X-Robots-Tag and TDM-Reservation."""
    found = set()
    for value in response.headers.getall("X-Robots-Tag", ()):
        name = "*"
        for part in value.lower().split(","):
            head, colon, tail = part.partition(":")
            if colon and head.strip() not in _VALUED_DIRECTIVES:
                name, part = head.strip(), tail  # "otherbot: noindex, nofollow": the name goes for what follows
            if name in ("*", agent):
                found.add("noindex" if part.strip() == "none" else part.strip())
    if response.headers.get("TDM-Reservation", "").strip() == "1":
        found.add("tdm-reservation")
    return found & {*OPT_OUT_DIRECTIVES, "tdm-reservation", *honoured}


def _retry_after(value: str) -> float | None:
    """Seconds that a Retry-After header asks for, given as seconds or as a date; None if it says nothing readable."""
    if value.strip().isdecimal():
        return float(value)
    try:
        return max((parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds(), 0.0)
    except (ValueError, TypeError, OverflowError):
        return None


def _pause(url: str, attempt: int, backoff: float) -> float:
    """Seconds before the try after `attempt`: doubling, and spread out by a digest so that equal runs wait equally."""
    digest = hashlib.sha256(f"{attempt} {url}".encode(errors="replace")).digest()
    return backoff * 2 ** (attempt - 1) * (0.5 + int.from_bytes(digest[:4]) / 2**32)
