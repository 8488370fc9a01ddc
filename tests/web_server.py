"""Servers for tests, each on an event loop in a thread of its own, so that what is tested runs its own."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from aiohttp import web

RawHandler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextmanager
def serve_app(app: web.Application) -> Iterator[int]:
    """The port of 127.0.0.1 where `app` answers while the block runs."""
    runner = web.AppRunner(app, shutdown_timeout=0.01)

    async def start() -> int:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner.addresses[0][1]

    with _on_a_thread(start, runner.cleanup) as port:
        yield port


@contextmanager
def serve_raw(handler: RawHandler, tls: ssl.SSLContext | None = None) -> Iterator[int]:
    """The port of 127.0.0.1 where `handler` is given each connection, bytes and all, while the block runs."""
    servers: list[asyncio.Server] = []

    async def start() -> int:
        servers.append(await asyncio.start_server(handler, "127.0.0.1", 0, ssl=tls, backlog=1024))
        return servers[0].sockets[0].getsockname()[1]

    async def stop() -> None:
        servers[0].close()

    with _on_a_thread(start, stop) as port:
        yield port


@contextmanager
def _on_a_thread(start: Callable[[], Awaitable[int]], stop: Callable[[], Awaitable[None]]) -> Iterator[int]:
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)  # clients that go away in the middle are the point of these servers
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def end() -> None:
        await stop()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def begin() -> int:
        return await start()

    try:
        yield asyncio.run_coroutine_threadsafe(begin(), loop).result(10)
    finally:
        asyncio.run_coroutine_threadsafe(end(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
