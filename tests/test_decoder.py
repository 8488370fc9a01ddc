"""Decoding in processes that may die: every hostile file costs its own row and no more."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from stages import decoder as decoder_module
from stages.decoder import Decoders
from stages.pictures import PictureRules
from tests.hostile_files import encode, every_file, many_scans, png, scene, zeros

RULES: dict[str, Any] = {
    "min_edge": 16,
    "max_edge": 512,
    "max_pixels": 4_000_000,
    "max_aspect_ratio": 4.0,
    "quality": 95,
}
FILES = every_file()
GOOD = encode(scene())
MEMORY_MB = 100


def decoders(*, count: int = 1, memory_mb: int = MEMORY_MB, seconds: float = 10.0, **rules: Any) -> Decoders:
    return Decoders(PictureRules(**{**RULES, **rules}), count=count, memory_mb=memory_mb, seconds=seconds)


def children() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if "stages.decoder" in " ".join(p.cmdline())]


@pytest.fixture(scope="module")
def one() -> Iterator[Decoders]:
    """A single process for many files: it must be as good after each of them."""
    yield decoders()


def test_there_are_enough_hostile_files() -> None:
    assert len(FILES) >= 90 and sum(None not in ends for _, ends in FILES.values()) >= 60


@pytest.mark.parametrize("name", FILES)
def test_every_file_has_one_typed_end(one: Decoders, name: str) -> None:
    data, ends = FILES[name]
    picture = one.decode(data)
    assert picture.reason in ends
    assert (picture.image is None) is (picture.reason is not None)
    assert all((v is None) is (picture.image is None) for v in (picture.width, picture.height, picture.pdq))
    assert (picture.original_width is None) == (picture.original_height is None)
    assert one.decode(GOOD).image == GOOD


def test_their_process_lives_on_within_its_memory(one: Decoders) -> None:
    for data, _ in FILES.values():
        one.decode(data)
    before = {p.pid for p in children()}
    assert one.decode(GOOD).image == GOOD and {p.pid for p in children()} == before
    # What it has taken at the most, in kilobytes: libraries, and one picture's share.
    peaks = [int(line.split()[1]) for pid in before for line in Path(f"/proc/{pid}/status").read_text().splitlines()
             if line.startswith("VmHWM")]  # fmt: skip
    assert peaks and max(peaks) < (MEMORY_MB + 150) << 10


def test_too_much_work_is_ended_and_the_process_replaced() -> None:
    pool = decoders(seconds=0.2)
    assert pool.decode(GOOD).reason is None
    before = {p.pid for p in children()}
    assert pool.decode(many_scans(20_000)).reason == "decode_timeout"
    assert pool.decode(GOOD).image == GOOD
    assert {p.pid for p in children()} != before


def test_too_much_memory_is_refused() -> None:
    large = png(1900, 1900, zeros(1900 * (1900 * 8 + 1)), depth=16, colour=6)
    assert decoders(memory_mb=400).decode(large).reason is None
    pool = decoders(memory_mb=8)
    assert pool.decode(large).reason == "decode_memory"
    assert pool.decode(GOOD).image == GOOD


def test_a_process_that_dies_costs_one_picture() -> None:
    before = set(children())
    pool = decoders()
    assert pool.decode(GOOD).reason is None
    (process,) = set(children()) - before
    process.send_signal(signal.SIGSTOP)
    threading.Timer(0.3, process.send_signal, [signal.SIGSEGV]).start()
    threading.Timer(0.4, process.send_signal, [signal.SIGCONT]).start()
    assert pool.decode(GOOD).reason == "decode_died"
    assert pool.decode(GOOD).image == GOOD


def test_threads_share_the_processes() -> None:
    pool = decoders(count=2)
    pictures = [encode(scene(40 + n, 40)) for n in range(30)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(pool.decode, pictures))
    assert [p.image for p in found] == pictures and [p.width for p in found] == [40 + n for n in range(30)]


def test_the_same_file_is_the_same_bytes_anywhere() -> None:
    large = encode(scene(1300, 1100))
    assert decoders().decode(large) == decoders(memory_mb=300).decode(large)


def test_processes_have_nothing_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    before = {p.pid for p in children()}
    pool = decoders()
    pool.decode(GOOD)
    (process,) = [p for p in children() if p.pid not in before]
    assert "AWS_SECRET_ACCESS_KEY" not in process.environ() and "PYTHONPATH" in process.environ()


def test_processes_end_with_their_owner() -> None:
    before = {p.pid for p in children()}
    pool = decoders()
    pool.decode(GOOD)
    (process,) = [p for p in children() if p.pid not in before]
    del pool
    assert not process.is_running()


def test_processes_end_with_a_parent_that_is_killed() -> None:
    script = (
        "import psutil, sys; from stages.decoder import Decoders; from stages.pictures import PictureRules\n"
        f"pool = Decoders(PictureRules(**{RULES}), count=1, memory_mb=99, seconds=9); pool.decode(b'')\n"
        "print(psutil.Process().children()[0].pid, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        process = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    process.wait(30)


def test_a_process_that_cannot_start_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cv2.py").write_text("raise ImportError('no such library')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RuntimeError, match="before its first picture"):
        decoders().decode(GOOD)


@pytest.mark.parametrize("answer", [b"[]", b'{"same": true}', b'{"same": true, "pdq": "00", "width": 1}', b"\xff"])
def test_nonsense_from_a_process_is_not_believed(answer: bytes) -> None:
    with pytest.raises(decoder_module._Died):
        decoder_module._picture(answer, b"", b"")


def test_boxes_are_blurred() -> None:
    noise = np.random.default_rng(0).integers(256, size=(200, 300, 3), dtype=np.uint8)
    pool = decoders(blur=True, memory_mb=400)
    plain = pool.decode(encode(noise, quality=95))
    blurred = pool.decode(encode(noise, quality=95), [(0.1, 0.1, 0.4, 0.9)])
    assert plain.reason is blurred.reason is None and plain.image == encode(noise, quality=95)
    pixels = np.asarray(Image.open(io.BytesIO(blurred.image or b""))).astype(float)
    assert pixels[80:120, 50:100].std() < 40 < pixels[80:120, 200:280].std()
    assert (blurred.width, blurred.height) == (300, 200)
