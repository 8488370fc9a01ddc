"""What one HTTP answer comes to: its body within bounds, the headers worth keeping, or a reason from a short list."""

from __future__ import annotations

import re
import socket
import ssl
import zlib
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Literal

import aiohttp

from .addresses import Refused

REDIRECTS = (301, 302, 303, 307, 308)
_NAMED_STATUSES = (403, 404, 429)
_PACKED = ("gzip", "x-gzip", "deflate")
_UNREADABLE = ("br", "zstd", "compress", "x-compress", "dcb", "dcz")
_LONGEST_HOLD = 86_400.0
_ETAG = re.compile(r'(?:W/)?"[\x21\x23-\x7e]{0,254}"')


Status = Literal["ok", "unchanged", "failed", "dropped"]


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """What became of one URL."""

    url: str
    status: Status
    """unchanged: the server says (304) that it is still what the validators sent were of."""
    reason: str = ""
    """Why not: bad_url, bad_scheme, bad_port, blocked_address, dns, connection, tls, timeout, bad_answer, http_403,
    http_404, http_429, http_4xx, http_5xx (http_1xx, http_2xx, http_3xx: without a body of its own), too_many_redirects,
    too_large, opt_out, empty_body, cut_body, bad_encoding, host_down, host_busy, robots_unreachable, unexpected. Empty
    where status is ok or unchanged."""
    data: bytes | None = None
    """The body, only where status is ok."""
    http_status: int | None = None
    """Of the last answer, None when there was none."""
    attempts: int = 0
    """Requests for it, redirects not counted."""
    transient: bool = False
    """Whether another run may well have more luck."""
    directives: str = ""
    """Directives of `stages.opt_out.KNOWN` seen that address us, sorted, with commas between; heeded or not. Of a URL that
    robots.txt keeps us from, only the site's."""
    content_type: str = ""
    """As the server said it, which is often wrong."""
    etag: str = ""
    """For a later conditional request; empty if there was none, or none worth keeping."""
    last_modified: str = ""
    """For a later conditional request; empty if there was none, or none worth keeping."""


class Stopped(Exception):
    """A try that ended without a body."""

    def __init__(self, reason: str, *, transient: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.transient = reason, transient


async def read_body(response: aiohttp.ClientResponse, max_bytes: int, *, cut: bool = False) -> bytes:
    """The body, at most `max_bytes` of it in memory; of a longer one the beginning if `cut`, else Stopped("too_large").

    aiohttp compares it with Content-Length and its chunks' lengths (ClientPayloadError).
    """
    if not cut and (response.content_length or 0) > max_bytes:
        raise Stopped("too_large")
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > max_bytes:
            if not cut:
                raise Stopped("too_large")
            del body[max_bytes:]
            break
    encoding = response.headers.get("Content-Encoding", "").strip().lower()
    if encoding in _UNREADABLE:
        raise Stopped("bad_encoding")
    if encoding in _PACKED:  # asked for or not, some servers pack everything
        return _unpack(body, max_bytes, cut=cut)
    if not body:
        raise Stopped("empty_body")
    return bytes(body)


def _unpack(body: bytearray, max_bytes: int, *, cut: bool) -> bytes:
    """The gzip or zlib body, never more than `max_bytes` + 1 of it in memory."""
    inflater = zlib.decompressobj(wbits=32 + zlib.MAX_WBITS)
    try:
        data = inflater.decompress(body, max_bytes + 1)
    except zlib.error:
        raise Stopped("bad_encoding") from None
    if len(data) > max_bytes and not cut:
        raise Stopped("too_large")
    if not inflater.eof and not cut:
        raise Stopped("cut_body", transient=True)
    if not data:
        raise Stopped("empty_body")
    return data[:max_bytes]


def status_stop(status: int) -> Stopped:
    """What an HTTP status means that brings no body: 4xx is for good but for 429, 5xx may pass."""
    reason = f"http_{status}" if status in _NAMED_STATUSES else f"http_{status // 100}xx"
    return Stopped(reason, transient=status == 429 or 500 <= status < 600)


def stop_of(error: Exception) -> Stopped:
    """What ended a try, as a reason. The order matters: aiohttp's errors inherit crosswise."""
    if isinstance(error, Stopped):
        return error
    if isinstance(error, Refused):
        return Stopped(error.reason)
    if isinstance(error, TimeoutError):
        return Stopped("timeout", transient=True)
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        # The name server is busy, or else the name is gone.
        return Stopped("dns", transient=error.os_error.errno == socket.EAI_AGAIN)
    if isinstance(error, aiohttp.ClientPayloadError):
        return Stopped("cut_body", transient=True)
    if isinstance(error, (aiohttp.ClientSSLError, ssl.SSLError, ssl.CertificateError)):
        return Stopped("tls")
    if isinstance(error, (aiohttp.InvalidURL, UnicodeError)):
        return Stopped("bad_url")
    if isinstance(error, aiohttp.ClientResponseError):
        return Stopped("bad_answer")
    if isinstance(error, (aiohttp.ClientError, OSError, EOFError)):
        return Stopped("connection", transient=True)
    return Stopped("unexpected")


def retry_after(value: str) -> float | None:
    """Seconds (at most a day) that a Retry-After header asks for, as seconds or a date; None if it says nothing readable."""
    if value.strip().isdecimal():
        return min(float(value), _LONGEST_HOLD)
    try:
        seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(seconds, 0.0), _LONGEST_HOLD)


def etag_of(value: str | None) -> str:
    """An ETag that is safe to keep and to send back, "" for anything else."""
    return value if value and _ETAG.fullmatch(value) else ""


def date_of(value: str | None) -> str:
    """A Last-Modified date that is safe to keep and to send back, "" for anything else."""
    if not value or len(value) > 64 or not value.isascii() or not value.isprintable():
        return ""
    try:
        parsedate_to_datetime(value)
    except (ValueError, TypeError, OverflowError):
        return ""
    return value
