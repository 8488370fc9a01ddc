"""Serves a shapes source over real HTTP on this machine, with all its bad manners, from a process of its own.

python -m examples.shapes.server --count 2000 --seed 0 --port 8723
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import hashlib
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from aiohttp import web

from .source import Row, ShapesSource, picture, truth
from .world import tile_bank

HOST = "127.0.0.1"
PORT = 8723  # the demo's: a sample's key is a digest of its URL, so the port must not change between runs
_SLOW_SECONDS = 600.0  # longer than any timeout
_ROOT = Path(__file__).resolve().parents[2]
_PAGE = "<!doctype html><html><head><title>Gone</title></head><body>This picture has moved.</body></html>"


@contextmanager
def serve(config: ShapesSource, port: int = 0) -> Iterator[str]:
    """The base URL (no slash behind it) of a server for `config`, which ends with the block, or with this process.

    port 0 takes a free one. Raises RuntimeError with the server's own words when it cannot start.
    """
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "examples.shapes.server", *_flags(config), f"--port={port}", "--with-parent"]
    with subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said = line.strip()
            if said.startswith("http://"):
                break
        else:
            raise RuntimeError(said or "shapes server: ended without a word")
        # A full pipe would stop the server, so its complaints are read to the end, and dropped.
        drain = threading.Thread(target=process.stdout.read, daemon=True)
        drain.start()
        try:
            yield said
        finally:
            process.kill()
            drain.join()


class _Server:
    """One source's handlers. What it remembers is how often each picture was asked for."""

    def __init__(self, config: ShapesSource) -> None:
        self._config = config
        self._rows = truth(config)
        self._asked: Counter[str] = Counter()

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/p/{name}", self._answer)
        app.router.add_get("/moved/{name}", self._moved)
        app.router.add_get("/asked", self._tell)
        return app

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        row = self._rows.get(request.path)
        if row is None:
            raise web.HTTPNotFound
        self._asked[row.path] += 1
        if row.behaviour == "missing":
            raise web.HTTPNotFound
        if row.behaviour == "flaky" and self._asked[row.path] == 1:
            raise web.HTTPInternalServerError
        if row.behaviour == "slow":
            await asyncio.sleep(_SLOW_SECONDS)
        if row.behaviour == "redirect":
            raise web.HTTPFound(row.path.replace("/p/", "/moved/"))
        if row.behaviour == "html":
            return web.Response(text=_PAGE, content_type="text/html")
        return self._picture(request, row)

    async def _moved(self, request: web.Request) -> web.StreamResponse:
        row = self._rows.get(request.path.replace("/moved/", "/p/"))
        if row is None or row.behaviour != "redirect":
            raise web.HTTPNotFound
        return self._picture(request, row)

    async def _tell(self, request: web.Request) -> web.Response:
        """By path, how often a picture was asked for; what a redirect led to is not counted again."""
        return web.json_response(self._asked)

    def _picture(self, request: web.Request, row: Row) -> web.Response:
        body = picture(self._config, row)
        tag = hashlib.sha256(body).hexdigest()[:16]
        if any(known.value == tag for known in request.if_none_match or ()):
            raise web.HTTPNotModified
        if row.behaviour == "truncated":
            body = body[: len(body) * 3 // 5]
        headers = {"X-Robots-Tag": "noai, noimageai"} if row.behaviour == "opt_out" else {}
        return web.Response(body=body, content_type="image/jpeg", headers={"ETag": f'"{tag}"', **headers})


async def _run(config: ShapesSource, port: int, until: asyncio.Event) -> None:
    server = _Server(config)
    for side in (8, 48, 64, 96, 128):  # now, because the first picture of a size would block the others for a second
        tile_bank(side)
    runner = web.AppRunner(server.app(), access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, HOST, port)
    await site.start()
    print(f"http://{HOST}:{runner.addresses[0][1]}", flush=True)
    try:
        await until.wait()
    finally:
        await runner.cleanup()


def _flags(config: ShapesSource) -> list[str]:
    """The command line that says `config`."""
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    texts = {n: ",".join(map(str, v)) if isinstance(v, tuple) else str(v) for n, v in values.items()}
    return [f"{_flag(name)}={text}" for name, text in texts.items()]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _parse(arguments: list[str] | None) -> tuple[ShapesSource, argparse.Namespace]:
    parser = argparse.ArgumentParser(prog="python -m examples.shapes.server", description="Serve a shapes source.")
    parser.add_argument(
        "--port", type=int, default=PORT, help="of 127.0.0.1; 0 takes a free one (default: %(default)s)"
    )
    parser.add_argument("--with-parent", action="store_true", help="stop when standard input is closed")
    kinds = {"int": int, "float": float}
    for f in fields(ShapesSource):
        kind = kinds.get(str(f.type), lambda text: tuple(map(float, text.split(","))))
        parser.add_argument(_flag(f.name), type=kind, default=f.default, help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        return ShapesSource(**{f.name: getattr(options, f.name) for f in fields(ShapesSource)}), options
    except ValueError as error:
        parser.error(str(error))


def main(arguments: list[str] | None = None) -> int:
    """The command: prints its base URL once it listens, and serves until it is stopped. 2 if it cannot."""
    config, options = _parse(arguments)

    async def run() -> None:
        until, loop = asyncio.Event(), asyncio.get_running_loop()

        def follow_parent() -> None:
            while os.read(sys.stdin.fileno(), 1 << 10):  # not sys.stdin: its lock would still be held at our exit
                pass
            loop.call_soon_threadsafe(until.set)

        if options.with_parent:
            threading.Thread(target=follow_parent, daemon=True).start()
        await _run(config, options.port, until)

    try:
        asyncio.run(run())
    except KeyboardInterrupt:
        return 0
    except (OSError, OverflowError) as error:
        taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        why = "is taken; stop what uses it, or pass another --port" if taken else f"cannot be used: {error}"
        print(f"shapes server: port {options.port} {why}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
