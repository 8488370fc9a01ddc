"""A store of objects with bad moments: an S3-compatible server on this machine, and a proxy before it that answers 503 SlowDown,
breaks connections before or in the middle of an answer, and is slow. Which requests it strikes follows from their number alone.
"""

from __future__ import annotations

import http.client
import itertools
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from .scale import s3_server

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
FAULTS = ("503", "refused", "cut", "slow")
# Headers of one connection, not of the answer.
_OWN = {"connection", "keep-alive", "transfer-encoding", "content-length"}


class _Proxy(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, store: str, every: int, seconds: float, struck: Counter[str]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.store, self.every, self.seconds, self.struck = urlsplit(store).netloc, every, seconds, struck
        self.numbers = itertools.count(1)

    def fault(self) -> str:
        """What befalls the next request: every so many one, each kind in turn."""
        number = next(self.numbers)
        found = FAULTS[number // self.every % len(FAULTS)] if number % self.every == 0 else ""
        self.struck[found or "none"] += 1
        return found

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away are none of ours."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Proxy

    def do(self) -> None:
        """Any request."""
        if self.headers.get("Expect") and "Content-Length" in self.headers:  # BaseHTTPRequestHandler said 100 Continue
            del self.headers["Expect"]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.fault()
        if fault == "503":
            self._answer(503, [("Content-Type", "application/xml")], SLOW_DOWN, len(SLOW_DOWN))
            return
        if fault == "refused":
            self.close_connection = True
            return
        if fault == "slow":
            time.sleep(self.server.seconds)
        store = http.client.HTTPConnection(self.server.store, timeout=60)
        try:
            store.request(self.command, self.path, body, dict(self.headers))
            answer = store.getresponse()
            data, headers = answer.read(), [(k, v) for k, v in answer.getheaders() if k.lower() not in _OWN]
        finally:
            store.close()
        size = int(answer.headers.get("Content-Length") or 0) if self.command == "HEAD" else len(data)
        self._answer(answer.status, headers, data[: len(data) // 2] if fault == "cut" else data, size)
        self.close_connection = self.close_connection or fault == "cut"

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, size: int) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def unreliable_store(
    every: int, seconds: float, struck: Counter[str]
) -> Iterator[tuple[dict[str, str], dict[str, str]]]:
    """A bucket `data` behind the proxy: the environment in which s3fs finds it, and the one in which it goes past the proxy. Of
    `every` requests one is struck, and a slow one takes `seconds` more; `struck` counts them by kind.
    """
    with s3_server(Counter()) as (address, _):
        proxy = _Proxy(address, every, seconds, struck)
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        access = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
        access |= {"AWS_MAX_ATTEMPTS": "1"}  # botocore's own would hide what s3fs and the dataset folder do
        try:
            yield (
                {**access, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.server_port}"},
                {**access, "AWS_ENDPOINT_URL": address},
            )
        finally:
            proxy.shutdown()
            proxy.server_close()
