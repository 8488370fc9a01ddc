"""Answers of servers that are broken or mean harm, as bytes on a raw socket, and what each has to end as."""

from __future__ import annotations

import asyncio
import gzip
import socket
import struct
import zlib
from collections.abc import Awaitable, Callable

BODY = bytes(range(256)) * 16
MAX_BYTES = 1 << 16
CONTENT_ENCODINGS = ("br", "zstd", "compress")

Answer = bytes | Callable[[asyncio.StreamWriter], Awaitable[None]]


def http(
    body: bytes = BODY, *headers: str, status: str = "200 OK", length: int | str | None = None, kept: bool = False
) -> bytes:
    """An answer; `length` for a Content-Length that lies, `kept` where the connection stays open behind it.

    A server that closes without a word leaves a connection that somebody else's question may be sent on, just before the end
    arrives: what that question comes to would then depend on how busy the machine is.
    """
    lines = [f"HTTP/1.1 {status}", *headers, f"Content-Length: {len(body) if length is None else length}"]
    lines[1:1] = [] if kept else ["Connection: close"]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def chunked(*chunks: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    """An answer in chunks as they are given, sizes and all."""
    return b"HTTP/1.1 200 OK\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + b"".join(chunks) + end


def chunk(data: bytes, size: bytes | None = None) -> bytes:
    """One chunk; `size` for one that lies."""
    return (b"%x" % len(data) if size is None else size) + b"\r\n" + data + b"\r\n"


def redirect(location: str) -> bytes:
    """A redirect to anything."""
    return http(b"", f"Location: {location}", status="302 Found")


def again_and_again(start: bytes, more: bytes, pause: float = 0.0) -> Answer:
    """`start`, and then `more` without end."""

    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(start)
        while not writer.is_closing():
            writer.write(more)
            await writer.drain()
            await asyncio.sleep(pause)

    return answer


def reset(start: bytes) -> Answer:
    """`start`, and then the connection is reset rather than closed."""

    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(start)
        await writer.drain()
        await asyncio.sleep(0.05)
        raw = writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    return answer


async def _silence(writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(60)


GOOD = http(BODY, "Content-Type: image/x-test")
HEAD = GOOD[: GOOD.index(b"\r\n\r\n")]
_RAW_DEFLATE = zlib.compress(BODY)[2:-4]

# By name: the answer, and the reason it has to end with; "" where it has to be taken. What is wrong with a body's framing is
# noticed with the headers or behind them, as the packets come: the two that never end may end either way.
ANSWERS: dict[str, tuple[Answer, str]] = {
    # cut short, at every kind of boundary
    "nothing": (b"", "connection"),
    "cut in the protocol": (b"HTT", "connection"),
    "cut in the status": (b"HTTP/1.1 20", "connection"),
    "cut after the status": (b"HTTP/1.1 200 OK\r\n", "connection"),
    "cut in a header's name": (b"HTTP/1.1 200 OK\r\nContent-Le", "connection"),
    "cut in a header's value": (b"HTTP/1.1 200 OK\r\nContent-Length: 40", "connection"),
    "cut before the empty line": (HEAD + b"\r\n", "connection"),
    "cut before the body": (HEAD + b"\r\n\r\n", "cut_body"),
    "cut in the body": (GOOD[:-1], "cut_body"),
    "cut in a chunk's size": (chunked(chunk(BODY), end=b"10"), "cut_body"),
    "cut after a chunk's size": (chunked(chunk(BODY), end=b"10\r\n"), "cut_body"),
    "cut in a chunk": (chunked(chunk(BODY), end=b"10\r\nabc"), "cut_body"),
    "cut after a chunk": (chunked(chunk(BODY), end=b""), "cut_body"),
    "cut in the last chunk": (chunked(chunk(BODY), end=b"0\r\n"), "cut_body"),
    "cut in the packing": (http(gzip.compress(BODY)[:-9], "Content-Encoding: gzip"), "cut_body"),
    "reset at once": (reset(b""), "connection"),
    "reset in the body": (reset(GOOD[:-100]), "cut_body"),
    # lengths that lie
    "longer than it says": (http(BODY + b"more", length=len(BODY)), "bad_answer"),
    "length of ten terabytes": (http(length=10**13), "too_large"),
    "length below zero": (http(length=-1), "bad_answer"),
    "length in words": (http(length="many"), "bad_answer"),
    "length of a thousand digits": (http(length="9" * 1000), "bad_answer"),
    "two lengths": (http(BODY, "Content-Length: 3"), "bad_answer"),
    "length and chunks": (http(chunk(BODY) + b"0\r\n\r\n", "Transfer-Encoding: chunked"), "bad_answer"),
    "chunk size that is none": (chunked(chunk(BODY, b"xyz")), "bad_answer"),
    "chunk size below zero": (chunked(chunk(BODY, b"-5")), "bad_answer"),
    "chunk of half the world": (chunked(chunk(BODY, b"7fffffffffffffff")), "cut_body"),
    "chunk size beyond 64 bits": (chunked(chunk(BODY, b"f" * 40)), "bad_answer"),
    "chunk longer than its size": (chunked(chunk(BODY, b"10")), "bad_answer"),
    "chunks of one byte": (chunked(*[chunk(b"x")] * 2000), ""),
    "unknown transfer": (http(BODY, "Transfer-Encoding: pigeon"), "bad_answer"),
    # without end
    "body without end": (again_and_again(b"HTTP/1.1 200 OK\r\n\r\n", bytes(1 << 16)), "too_large"),
    "chunks without end": (again_and_again(chunked(end=b""), chunk(bytes(1 << 14))), "too_large"),
    "headers without end": (again_and_again(b"HTTP/1.1 200 OK\r\n", b"A: b\r\n"), "bad_answer"),
    "a header without end": (again_and_again(b"HTTP/1.1 200 OK\r\nA: ", b"b" * 1024), "bad_answer"),
    "status line without end": (again_and_again(b"HTTP/1.1 200 ", b"OK" * 512), "bad_answer"),
    "trailers without end": (again_and_again(chunked(chunk(BODY), end=b"0\r\n"), b"A: b\r\n"), "bad_answer|cut_body"),
    "chunk extension without end": (again_and_again(chunked(end=b"1;"), b"a=b" * 400), "bad_answer|cut_body"),
    "continue without end": (again_and_again(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.01), "timeout"),
    "silence": (_silence, "timeout"),
    "dripping status": (again_and_again(b"HTTP/1.1 200 ", b"O", 0.05), "timeout"),
    "dripping headers": (again_and_again(b"HTTP/1.1 200 OK\r\n", b"A: b\r\n", 0.05), "timeout"),
    "dripping body": (again_and_again(http(b"", length=9999), b"x", 0.05), "timeout"),
    "dripping chunks": (again_and_again(chunked(end=b""), chunk(b"x"), 0.05), "timeout"),
    # packed
    "bomb": (http(gzip.compress(bytes(20 << 20)), "Content-Encoding: gzip"), "too_large"),
    "bomb of a bomb": (http(gzip.compress(gzip.compress(bytes(20 << 20))), "Content-Encoding: gzip"), ""),
    "packed unasked": (http(gzip.compress(BODY), "Content-Encoding: GZIP"), ""),
    "packed with zlib": (http(zlib.compress(BODY), "Content-Encoding: deflate"), ""),
    "packed with bare deflate": (http(_RAW_DEFLATE, "Content-Encoding: deflate"), "bad_encoding"),
    "not packed at all": (http(b"\xff\xd8\xff" + BODY, "Content-Encoding: gzip"), "bad_encoding"),
    "packed nothing": (http(gzip.compress(b""), "Content-Encoding: gzip"), "empty_body"),
    "packed as nobody does": (http(BODY, "Content-Encoding: utf-8"), ""),
    **{f"packed with {name}": (http(BODY, f"Content-Encoding: {name}"), "bad_encoding") for name in CONTENT_ENCODINGS},
    # not HTTP, or hardly
    "garbage": (b"\x00\xff\xfe not http \r\n\r\n", "bad_answer"),
    "HTTP/0.9": (b"<html>hello</html>", "bad_answer"),
    "a TLS alert": (b"\x15\x03\x01\x00\x02\x02\x46", "bad_answer"),
    "HTTP/2 frames": (b"\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x64", "bad_answer"),
    "another protocol": (b"220 mail.example ESMTP\r\n", "bad_answer"),
    "status of letters": (http(status="abc OK"), "bad_answer"),
    "status of five digits": (http(status="20000 OK"), "bad_answer"),
    "zero byte in a header": (http(BODY, "A: b\x00c"), "bad_answer"),
    "header without a name": (http(BODY, ": value"), "bad_answer"),
    "header with letters of no alphabet": (http(BODY, "Content-Type: \xff\xfe\x80"), ""),
    "header as large as a picture": (http(BODY, "A: " + "b" * 300_000), "bad_answer"),
    "five thousand headers": (http(BODY, *[f"A{n}: b" for n in range(5000)]), "bad_answer"),
    "cookies": (http(BODY, *["Set-Cookie: a=b; Domain=127.0.0.1"] * 50), ""),
    # statuses
    "empty": (http(b""), "empty_body"),
    "a web page": (http(b"<!doctype html><p>Gone.", "Content-Type: text/html"), ""),
    "hints first": (b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + GOOD, ""),
    "other protocols": (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n", "http_1xx"),
    "no content": (b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n", "http_2xx"),
    "a part unasked": (http(BODY[:9], "Content-Range: bytes 0-8/99", status="206 Partial Content"), "http_2xx"),
    "unchanged unasked": (b"HTTP/1.1 304 Not Modified\r\nConnection: close\r\n\r\n", "http_3xx"),
    "a password, please": (http(b"?", 'WWW-Authenticate: Basic realm="x"', status="401 Unauthorized"), "http_4xx"),
    "a proxy's password": (http(b"?", "Proxy-Authenticate: Basic", status="407 Proxy"), "http_4xx"),
    "gone": (http(b"", status="410 Gone"), "http_4xx"),
    "an invented status": (http(b"", status="999 Request denied"), "http_9xx"),
    "out of order": (http(b"", status="500 Oh no"), "http_5xx"),
    # redirects
    "redirect to itself": (redirect("/redirect%20to%20itself"), "too_many_redirects"),
    "redirect to a redirect": (redirect("/redirect%20to%20itself"), "too_many_redirects"),
    "redirect to nowhere": (http(b"", status="302 Found"), "http_3xx"),
    "redirect to nothing": (redirect(""), "http_3xx"),
    "redirect to a file": (redirect("file:///etc/passwd"), "bad_scheme"),
    "redirect to data": (redirect("data:image/png;base64,AAAA"), "bad_scheme"),
    "redirect to a script": (redirect("javascript:alert(1)"), "bad_scheme"),
    "redirect to no host": (redirect("http://"), "too_many_redirects"),
    "redirect to half a host": (redirect("http://[::1"), "bad_url"),
    "redirect to a port that is none": (redirect("http://pictures.example:99999/"), "bad_url"),
    "redirect to letters of no alphabet": (redirect("http://\xff\xfe/"), "bad_url"),
    "redirect to a header": (redirect("/%0d%0aX-Evil:%20yes"), ""),
    "redirect to a novel": (redirect("/" + "a" * 100_000), "bad_answer"),
    "redirect to private addresses": (redirect("http://10.0.0.1/admin"), "blocked_address"),
    "redirect to the cloud's secrets": (redirect("http://169.254.169.254/latest/meta-data"), "blocked_address"),
    "redirect to a number": (redirect("http://167772161/"), "blocked_address"),
    "redirect behind a name": (redirect("http://pictures.example@10.0.0.1/"), "blocked_address"),
    "redirect to IPv4 in IPv6": (redirect("http://[::ffff:10.0.0.1]/"), "blocked_address"),
    "redirect to a mail server": (redirect("http://127.0.0.1:25/"), "bad_port"),
}
