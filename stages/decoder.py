"""Decodes pictures in processes that may die: each has a limit of memory, and of time for each picture.

A picture is the one thing here that strangers can make as they like and that libraries in C read. Whatever it does to the
process that decodes it, it costs its own row: a process that is killed, or takes too long, is replaced. The processes
know the rules and the picture; they have no environment variables of ours, write no files, and end with their parent.
"""

from __future__ import annotations

import json
import os
import queue
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn, get_args

from PIL import Image

from .pictures import Box, Picture, PictureRules, Reason

_SIZES = struct.Struct("<II")  # what goes either way: bytes of JSON, bytes of picture, then both
_MOST_JSON = 1 << 16
_MOST_IMAGE = 1 << 28
_STARTING = 120.0  # seconds
_PATIENCE = 10.0  # times the processor time that a picture may take: a machine can have other things to do
_START = "import sys; from stages.decoder import serve; serve(int(sys.argv[1]))"


class Decoders:
    """A few such processes. Threads may share it: each `decode` has one process for itself, or waits for one."""

    def __init__(self, rules: PictureRules, *, count: int, memory_mb: int, seconds: float) -> None:
        """memory_mb: what a process may take on top of its libraries; seconds: processor time for one picture."""
        self._orders = json.dumps({"rules": asdict(rules), "memory_mb": memory_mb, "seconds": seconds}).encode()
        self._wall = _PATIENCE * (1 + seconds)
        self._idle: queue.LifoQueue[_Process | None] = queue.LifoQueue()
        for _ in range(count):
            self._idle.put(None)

    def decode(self, data: bytes, boxes: Sequence[Box] = ()) -> Picture:
        """What comes of the file. Raises RuntimeError where no process can be started, and for nothing in the data."""
        process, alive = self._idle.get(), False
        try:
            process = process or _Process(self._orders)
            picture, alive = process.decode(data, boxes, self._wall)
            return picture
        finally:
            self._idle.put(process if alive else None)  # one that was interrupted has an answer left, to no question


class _Died(Exception):
    """The process has gone, or says what no decoder would."""


class _Process:
    """One process and our end of the socket to it."""

    def __init__(self, orders: bytes) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        # A process reads to the end of its socket and goes. Waited for when nobody has the decoders any more, and at exit.
        self._end = weakref.finalize(self, _end, self._process, self._socket)
        try:
            self._socket.settimeout(_STARTING)
            _send(self._socket, orders)
            if _receive(self._socket) != (b"ready", b""):
                raise _Died
        except (OSError, _Died):
            self._end()
            raise RuntimeError(
                f"a decoder's process ended with {self._process.returncode} before its first picture: see its last lines above"
            ) from None

    def decode(self, data: bytes, boxes: Sequence[Box], wall: float) -> tuple[Picture, bool]:
        """What comes of the file, and whether the process is still there."""
        try:
            until = time.monotonic() + wall
            self._socket.settimeout(wall)
            _send(self._socket, json.dumps(list(boxes)).encode(), data)
            facts, image = _receive(self._socket, until=until)
            return _picture(facts, image, data), True
        except (OSError, _Died):
            self._end()
            late = self._process.returncode == -signal.SIGPROF
            reason: Reason = "decode_timeout" if late else "decode_died"
            return Picture(reason=reason), False


def _end(process: subprocess.Popen[bytes], ours: socket.socket) -> None:
    """Kills what still runs. A process on its way out gets a moment, because how it ended is what we want to know."""
    ours.close()
    try:
        process.wait(0.5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _environment() -> dict[str, str]:
    """What Python and its libraries need; nothing that a picture could want to read."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT") if name in os.environ}
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    # Rows of pixels are asked for and given back all the time: keep up to 64 MB of them from going back to the kernel.
    memory = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 25), "MALLOC_TRIM_THRESHOLD_": str(1 << 26)}
    return {**kept, **threads, **memory, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}


def _send(to: socket.socket, text: bytes, image: bytes = b"") -> None:
    to.sendall(_SIZES.pack(len(text), len(image)) + text)
    to.sendall(image)


def _receive(source: socket.socket, most_image: int = _MOST_IMAGE, until: float | None = None) -> tuple[bytes, bytes]:
    """What the other side sent. Raises _Died at its end, or where it claims to send more than it would; TimeoutError where
    not all has come `until` then, of the monotonic clock.
    """
    text, image = _SIZES.unpack(_read(source, _SIZES.size, until))
    if text > _MOST_JSON or image > most_image:
        raise _Died
    return _read(source, text, until), _read(source, image, until)


def _read(source: socket.socket, count: int, until: float | None) -> bytes:
    room = bytearray(count)
    view, done = memoryview(room), 0
    while done < count:
        if until is not None:
            source.settimeout(max(until - time.monotonic(), 1e-3))
        got = source.recv_into(view[done:])
        if not got:
            raise _Died
        done += got
    return bytes(room)


def _picture(facts: bytes, image: bytes, data: bytes) -> Picture:
    """The picture that a process told of. Raises _Died for nonsense: it may be the picture that speaks."""
    try:
        found = json.loads(facts)
        same, pdq = found.pop("same"), found.pop("pdq")
        picture = Picture(**found, pdq=bytes.fromhex(pdq) if pdq else None)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise _Died from None
    sizes = (picture.width, picture.height, picture.original_width, picture.original_height)
    told = all(n is None or (type(n) is int and 0 < n < 1 << 31) for n in sizes)
    quality = picture.pdq_quality
    told &= quality is None or (type(quality) is int and 0 <= quality <= 100)
    told &= picture.reason in get_args(Reason) if picture.reason is not None else None not in sizes
    if not told or len(picture.pdq or bytes(32)) != 32:
        raise _Died
    if picture.reason is None:
        picture = replace(picture, image=data if same else image)
    return picture


def serve(descriptor: int) -> NoReturn:
    """A decoder's process: answers pictures until its parent closes the socket."""
    with socket.socket(fileno=descriptor) as parent:
        orders = json.loads(_receive(parent)[0])
        rules, seconds = PictureRules(**orders["rules"]), float(orders["seconds"])
        from .scaling import make_picture, warm_up  # loads the libraries

        warm_up(rules)
        _confine(orders["memory_mb"] << 20)
        _send(parent, b"ready")
        while True:
            try:
                boxes, data = _receive(parent, most_image=sys.maxsize)
            except (_Died, OSError):
                os._exit(0)
            signal.setitimer(signal.ITIMER_PROF, seconds)  # ends the process, in whatever library it is then
            picture = make_picture(data, rules, [tuple(box) for box in json.loads(boxes)])
            signal.setitimer(signal.ITIMER_PROF, 0)
            _send(parent, *_told(picture, data))


def _told(picture: Picture, data: bytes) -> tuple[bytes, bytes]:
    """A picture as it is sent; bytes that the parent has are not sent back."""
    same = picture.image is data
    facts: dict[str, Any] = {**asdict(replace(picture, image=None)), "same": same}
    del facts["image"]
    facts["pdq"] = picture.pdq.hex() if picture.pdq else None
    return json.dumps(facts).encode(), b"" if same else picture.image or b""


def _confine(memory: int) -> None:
    """From here on: so many bytes more than now, no files written, no core dumps, nothing said on a terminal."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + memory
    for what, limit in ((resource.RLIMIT_AS, most), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(what, (limit, limit))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    Image.MAX_IMAGE_PIXELS = None  # the rules have their own
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
