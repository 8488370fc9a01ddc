"""Fetches URLs that strangers wrote: safely (public addresses only, bounded bytes and seconds) and politely.

A library of the download stage: it knows neither tables nor pictures. Nothing here raises for a URL's sake; every URL
ends as one `Fetched` with a reason from a short list. What it guards against is in the tests, hop by hop.

Built on aiohttp: a body of 300 KB costs it 0.16 ms of CPU time above the kernel's (httpx 2.7, pycurl 0.04), 0.3 ms with all
that is done here, against ten and more for decoding the picture; and it connects to the very addresses that our resolver has
checked. HTTP/1.1: a batch's pictures lie on many hosts, few on each, and open connections serve those; HTTP/2 would
multiplex what a polite pace keeps apart.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import aiohttp
from yarl import URL

from .addresses import CheckedResolver, checked_url
from .answers import REDIRECTS, Fetched, Status, Stopped, date_of, etag_of, read_body, retry_after, status_stop, stop_of
from .fetch_config import MANNERS, FetchConfig
from .hosts import Host, Hosts, Site
from .opt_out import header_directives, refused_by
from .robots import MOST_BYTES, SITE_FILES, product_token, read_site_file

__all__ = ["MANNERS", "FetchConfig", "Fetched", "Fetcher", "Then", "Validators", "fetch", "refused_by"]

Validators = tuple[str | None, str | None]
"""ETag and Last-Modified of an earlier answer."""

_SITE_LASTS, _SILENCE_LASTS = 86_400.0, 300.0  # RFC 9309, section 2.4: not longer than 24 hours
_STATUSES: dict[str, Status] = {"": "unchanged", "opt_out": "dropped"}  # by reason, without a body
_IDLE = (
    1.0  # seconds that an unused connection stays open: thousands of hosts would use up the files a process may have
)

_WAITING = 16  # bodies at most that have come and wait, beside those on their way

log = logging.getLogger(__name__)


Then = Callable[[Fetched], Awaitable[Any]]
"""What is done with a URL's end, in the fetcher's event loop."""


@dataclass(frozen=True, kw_only=True)
class _Errand:
    url: str
    max_bytes: int
    headers: Mapping[str, str] = field(default_factory=dict)
    for_site: bool = False
    """It is for a site's file: nobody else's word is asked first, and of a long one the beginning is enough."""


@dataclass(kw_only=True)
class _Seen:
    """What the answers of one try said, kept also when the try fails."""

    asked: bool = False
    response: aiohttp.ClientResponse | None = None  # the last one, with its headers
    silent_host: Host | None = None  # asked, and has not answered yet
    directives: set[str] = field(default_factory=set)


def fetch(
    urls: Sequence[str],
    config: FetchConfig,
    then: Then | None = None,
    *,
    conditions: Mapping[str, Validators | None] | None = None,
) -> list[Any]:
    """`Fetcher.fetch` for one batch alone."""
    with Fetcher(config) as fetcher:
        return fetcher.fetch(urls, then, conditions=conditions)


class Fetcher:
    """One worker's: its connections, looked-up names, hosts' paces and sites' files outlive a batch. Not for two threads
    at a time. Raises ValueError where `FetchConfig.check_contact` does.
    """

    def __init__(self, config: FetchConfig) -> None:
        config.check_contact()
        self._config = config
        self._agent = product_token(config.user_agent)
        self._slots = asyncio.Semaphore(config.concurrency)
        self._room = asyncio.Semaphore(min(config.concurrency, _WAITING))  # for bodies that wait for `then`
        self._hosts = Hosts(slots=config.per_host, interval=1 / config.per_host_rate)
        runner = asyncio.Runner()
        self._runner = runner
        self._session, resolver = runner.run(_open_session(config))
        self.close = weakref.finalize(self, _close, runner, self._session, resolver)
        """Closes the connections; happens by itself when nobody has the fetcher any more, and at exit."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fetch(
        self,
        urls: Sequence[str],
        then: Then | None = None,
        *,
        conditions: Mapping[str, Validators | None] | None = None,
    ) -> list[Any]:
        """One `Fetched` per URL, in the order given; a URL that is named twice is asked for once. With `then` what it makes
        of each instead: it is called as soon as that URL is there. It may take its time, for no more bodies are read than
        a few beyond those it has at hand. Without it all bodies are held together (up to len(urls) * max_bytes).

        A URL that has `conditions` is asked whether it has changed since.
        """
        unique = list(dict.fromkeys(urls))
        errands = [self._errand(url, (conditions or {}).get(url)) for url in unique]
        by_url = dict(zip(unique, self._runner.run(self._all(errands, then)), strict=True))
        return [by_url[url] for url in urls]

    async def _all(self, errands: Sequence[_Errand], then: Then | None) -> list[Any]:
        self._hosts.forget()
        tasks = [asyncio.create_task(self._finish(errand, then)) for errand in errands]
        try:
            return await asyncio.gather(*tasks)
        except BaseException:  # of `then`: nothing of this batch may linger in the next
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise

    async def _finish(self, errand: _Errand, then: Then | None) -> Any:
        fetched = await self._persist(errand)
        try:
            return fetched if then is None else await then(fetched)
        finally:
            if fetched.data is not None:
                self._room.release()

    def _errand(self, url: str, validators: Validators | None) -> _Errand:
        etag, date = (etag_of(validators[0]), date_of(validators[1])) if validators else ("", "")
        headers = {name: value for name, value in (("If-None-Match", etag), ("If-Modified-Since", date)) if value}
        return _Errand(url=url, max_bytes=self._config.max_bytes, headers=headers)

    async def _persist(self, errand: _Errand) -> Fetched:
        """`errand` with its retries. Sleeps hold no slot. A try that came to ask nothing is the last one."""
        fetched = Fetched(url=errand.url, status="failed")
        for attempt in range(1, self._config.retries + 2):
            tried, asked = await self._try(errand)
            if asked or attempt == 1:
                fetched = replace(tried, attempts=attempt if asked else 0)
            if not asked or not tried.transient or attempt > self._config.retries:
                break
            await asyncio.sleep(_pause(errand.url, attempt, self._config.backoff))
        return fetched

    async def _try(self, errand: _Errand) -> tuple[Fetched, bool]:
        """What one try came to, and whether it asked for anything."""
        seen, data, stop = _Seen(), None, Stopped("")
        try:
            data = await self._follow(errand, seen)
        except Exception as error:  # a hostile answer must cost its own row only, never the partition
            stop = stop_of(error)
            if stop.reason == "unexpected":
                log.warning("fetch: unexpected %s for %s", type(error).__name__, errand.url, exc_info=error)
            if seen.silent_host is not None and stop.transient:
                seen.silent_host.silent += 1
        headers = seen.response.headers if seen.response is not None else {}
        fetched = Fetched(
            url=errand.url,
            status=_STATUSES.get(stop.reason, "failed") if data is None else "ok",
            reason=stop.reason,
            data=data,
            http_status=seen.response.status if seen.response is not None else None,
            transient=stop.transient,
            directives=",".join(sorted(seen.directives)),
            content_type=headers.get("Content-Type", "")[:100],
            etag=etag_of(headers.get("ETag")),
            last_modified=date_of(headers.get("Last-Modified")),
        )
        return fetched, seen.asked

    async def _follow(self, errand: _Errand, seen: _Seen) -> bytes | None:
        """The body at the end of the redirects, None if it is unchanged. The deadline runs only while a slot is held."""
        config = self._config
        target, left = checked_url(errand.url, allow_private_hosts=config.allow_private_hosts), config.timeout
        for _ in range(config.max_redirects + 1):
            host = self._hosts.host(target.raw_host or "")
            if config.site_files and not errand.for_site:
                await self._heed(target, host, seen)
            await host.turn(config.max_wait)
            async with host.slots, self._slots:  # the host's slot first: a slow host must not sit on the common ones
                if host.is_down(config.host_patience):
                    raise Stopped("host_down", transient=True)
                begun = time.monotonic()
                seen.asked, seen.silent_host = True, host
                async with asyncio.timeout(left):
                    answer = await self._ask(target, errand, host, seen)
                left -= time.monotonic() - begun
                if isinstance(answer, bytes) and not errand.for_site:
                    await self._room.acquire()  # with the slots still held, so that reading waits for `then`
            if not isinstance(answer, URL):
                return answer
            target = answer
        raise Stopped("too_many_redirects")

    async def _ask(self, target: URL, errand: _Errand, host: Host, seen: _Seen) -> bytes | URL | None:
        """One request: the body, where the redirect points, or None if it is unchanged."""
        async with self._session.get(target, allow_redirects=False, headers=errand.headers) as response:
            host.silent, seen.silent_host, seen.response = 0, None, response
            seen.directives |= header_directives(response.headers, self._agent)
            if response.status in (429, 503):
                host.hold(retry_after(response.headers.get("Retry-After", "")) or self._config.backoff)
            location = response.headers.get("Location") if response.status in REDIRECTS else None
            unchanged = response.status == 304 and bool(errand.headers)
            if response.status != 200 and not location and not unchanged:
                raise status_stop(response.status)
            if not errand.for_site:
                self._refuse(seen)
            if location:
                return checked_url(location, base=target, allow_private_hosts=self._config.allow_private_hosts)
            return None if unchanged else await read_body(response, errand.max_bytes, cut=errand.for_site)

    def _refuse(self, seen: _Seen) -> None:
        if refused_by(",".join(seen.directives), self._config.opt_out):
            raise Stopped("opt_out")

    async def _heed(self, target: URL, host: Host, seen: _Seen) -> None:
        """Notes what the target's site says of it. Raises Stopped where that keeps us from asking."""
        origin = target.origin()
        site = await self._hosts.site(str(origin), lambda: self._ask_site(origin))
        if site.unreachable and "robots-disallow" in self._config.opt_out:
            raise Stopped(site.unreachable, transient=site.transient)
        seen.directives |= site.rules.directives(target.raw_path_qs)
        seen.directives |= {"robots-unreachable"} if site.unreachable else set()
        self._refuse(seen)
        host.interval = max(host.interval, site.rules.crawl_delay)

    async def _ask_site(self, origin: URL) -> Site:
        """Fetches a site's files, by the same rules as pictures."""
        site = Site(until=time.monotonic() + _SITE_LASTS)
        for name, path in SITE_FILES.items():
            if name not in self._config.site_files or site.unreachable:
                continue
            url = str(origin.with_path(path))
            got = await self._persist(_Errand(url=url, max_bytes=MOST_BYTES, for_site=True))
            if got.data is not None:
                read_site_file(name, got.data.decode(errors="replace"), self._agent, site.rules)
            elif name == "robots.txt" and not _is_absent(got):
                # A host that never answered fails its pictures as it failed us; else the site means all of it (RFC 9309).
                site.unreachable = got.reason if got.http_status is None else "robots_unreachable"
                site.transient = got.transient
                site.until = time.monotonic() + _SILENCE_LASTS
        return site


def _is_absent(got: Fetched) -> bool:
    """Whether there is no such file, rather than a server that fails to say what is in it."""
    absent = ("http_403", "http_404", "http_4xx", "http_3xx", "http_2xx", "empty_body", "too_many_redirects")
    return got.reason in absent


async def _open_session(config: FetchConfig) -> tuple[aiohttp.ClientSession, CheckedResolver]:
    resolver = CheckedResolver(allow_private_hosts=config.allow_private_hosts, threads=min(config.concurrency, 64))
    # The connector's own limits are off: waiting in them would count towards a try's deadline.
    connector = aiohttp.TCPConnector(limit=0, resolver=resolver, ttl_dns_cache=300, keepalive_timeout=_IDLE)
    session = aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
        auto_decompress=False,  # a small gzip body can hold gigabytes; read_body stops at max_bytes
        headers={"User-Agent": config.user_agent, "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"},
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=config.connect_timeout),
        read_bufsize=1 << 18,
    )
    return session, resolver


def _close(runner: asyncio.Runner, session: aiohttp.ClientSession, resolver: CheckedResolver) -> None:
    if asyncio._get_running_loop() is not None:  # collected while another loop runs here, which two cannot
        closer = threading.Thread(target=_close, args=(runner, session, resolver))
        closer.start()
        return closer.join()
    with runner:
        runner.run(session.close())
        runner.run(resolver.close())  # aiohttp closes only resolvers that it made itself


def _pause(url: str, attempt: int, backoff: float) -> float:
    """Seconds before the try after `attempt`: doubling, and spread out by a digest so that equal runs wait equally."""
    digest = hashlib.sha256(f"{attempt} {url}".encode(errors="replace")).digest()
    return backoff * 2 ** (attempt - 1) * (0.5 + int.from_bytes(digest[:4]) / 2**32)
