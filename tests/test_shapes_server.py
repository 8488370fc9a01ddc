"""The source and its server: every row misbehaves as it says, the truth is true, and nothing changes between runs."""

from __future__ import annotations

import io
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from examples.shapes.oracle import read_pictures
from examples.shapes.server import PORT, main, serve
from examples.shapes.source import (
    BEHAVIOURS,
    Row,
    ShapesSource,
    picture,
    row_of,
    rows,
    scenes,
    truth,
    write_source,
)
from stages.fetch import FetchConfig, Fetched, fetch
from stages.pictures import PictureRules
from stages.scaling import make_picture

ROOT = Path(__file__).parents[1]
MUCH: dict[str, Any] = dict.fromkeys(BEHAVIOURS[1:], 0.05)
SOURCE = ShapesSource(count=160, seed=6, **{**MUCH, "slow": 0.02})
FETCH = FetchConfig(allow_private_hosts=True, timeout=20.0, backoff=0.01, retries=1, per_host_rate=1000.0)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serve(SOURCE) as base_url:
        yield base_url


@pytest.fixture(scope="module")
def fetched(server: str) -> dict[int, Fetched]:
    """Every row by its number; only the slow ones with little patience, so that a busy machine fails nothing."""
    made: dict[int, Fetched] = {}
    for slow, timeout in ((True, 0.3), (False, 20.0)):
        chosen = [row for row in rows(SOURCE) if (row.behaviour == "slow") is slow]
        got = fetch([server + row.path for row in chosen], replace(FETCH, timeout=timeout))
        made |= {row.number: answer for row, answer in zip(chosen, got, strict=True)}
    return made


def of(behaviour: str) -> list[Row]:
    found = [row for row in rows(SOURCE) if row.behaviour == behaviour]
    assert found, f"no {behaviour} row to test with"
    return found


def refusal(data: bytes | None) -> str:
    assert data is not None
    rules = PictureRules(min_edge=16, max_edge=999, max_pixels=10**6, max_aspect_ratio=4, quality=95)
    return make_picture(data, rules).reason or ""


@pytest.mark.parametrize(
    ("behaviour", "status", "reason", "attempts"),
    [
        ("ok", "ok", "", 1),
        ("missing", "failed", "http_404", 1),
        ("flaky", "ok", "", 2),
        ("slow", "failed", "timeout", 2),
        ("truncated", "ok", "", 1),
        ("html", "ok", "", 1),
        ("redirect", "ok", "", 1),
        ("same_picture", "ok", "", 1),
        ("near_duplicate", "ok", "", 1),
        ("opt_out", "dropped", "opt_out", 1),
        ("off_world", "ok", "", 1),
        ("tiny", "ok", "", 1),
    ],
)
def test_rows_misbehave_as_they_say(
    fetched: dict[int, Fetched], behaviour: str, status: str, reason: str, attempts: int
) -> None:
    refused = {"truncated": "truncated", "html": "not_an_image", "tiny": "too_small"}.get(behaviour, "")
    for row in of(behaviour):
        got = fetched[row.number]
        assert (got.status, got.reason, got.attempts) == (status, reason, attempts), row
        if got.status == "ok":
            assert refusal(got.data) == refused, row
            assert got.content_type.startswith("text/html" if behaviour == "html" else "image/jpeg")


def test_what_is_served_is_what_the_truth_says(fetched: dict[int, Fetched]) -> None:
    wrong = 0
    shown = [row for name in ("ok", "flaky", "redirect", "same_picture", "near_duplicate") for row in of(name)]
    for row in shown:
        image = Image.open(io.BytesIO(fetched[row.number].data or b""))
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.crop((left, top, left + side, top + side)).resize((24, 24), Image.Resampling.BICUBIC)
        wrong += read_pictures(np.asarray(square)[None]).facts(0) != row.facts
    assert wrong <= len(shown) // 100
    assert all(row.facts is None for row in of("off_world"))


def test_copies_are_copies(fetched: dict[int, Fetched]) -> None:
    for row in of("same_picture"):
        assert row.copy_of is not None and row.copy_of < row.number
        assert fetched[row.number].data == fetched[row.copy_of].data
    for row in of("near_duplicate"):
        assert row.copy_of is not None
        one, two = (fetched[n].data or b"" for n in (row.number, row.copy_of))
        pixels, others = (np.asarray(Image.open(io.BytesIO(data))).astype(int) for data in (one, two))
        assert one != two and pixels.shape == others.shape and np.abs(pixels - others).mean() < 12


def test_a_known_picture_is_not_sent_again(server: str, fetched: dict[int, Fetched]) -> None:
    same, other = (server + row.path for row in of("ok")[:2])
    tag = fetched[of("ok")[0].number].etag
    assert tag
    answers = fetch([same, other], FETCH, conditions={url: (tag, None) for url in (same, other)})
    assert [a.status for a in answers] == ["unchanged", "ok"]


def test_unknown_paths_are_not_found(server: str) -> None:
    paths = ["/p/999999.jpg", "/moved/999999.jpg", of("ok")[0].path.replace("/p/", "/moved/"), "/", "/../../etc/passwd"]
    assert {f.reason for f in fetch([server + path for path in paths], FETCH)} == {"http_404"}


def test_rows_are_a_function_of_the_configuration_and_grow_at_their_end() -> None:
    made = rows(SOURCE)
    larger = replace(SOURCE, count=600)
    assert rows(larger)[:160] == made and rows(replace(SOURCE, seed=2)) != made
    assert (scenes(larger).cells[:160] == scenes(SOURCE).cells).all()
    assert picture(larger, made[7]) == picture(SOURCE, made[7])


def test_shares_are_about_kept() -> None:
    config = ShapesSource(count=3000)
    counts = Counter(row.behaviour for row in rows(config))
    for behaviour, share in zip(BEHAVIOURS[1:], config.fractions, strict=True):
        assert abs(counts[behaviour] / 3000 - share) < 0.015, behaviour
    planted = [row for row in rows(config) if row.planted_mismatch]
    assert 0.05 < len(planted) / 3000 < 0.1


def test_planted_texts_are_false_and_the_others_true() -> None:
    for row in rows(ShapesSource(count=1000)):
        if row.facts is None:
            continue
        colours = {thing.colour for thing in row.facts.things}
        named = set(row.text.replace(".", " ").replace(",", " ").split()) & set(ALL_COLOURS)
        assert not named & colours if row.planted_mismatch else named <= colours, row


ALL_COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "white", "cyan")


def test_the_table_and_its_truth_meet(tmp_path: Path) -> None:
    write_source(SOURCE, f"http://127.0.0.1:{PORT}", tmp_path / "deep" / "source.parquet")
    write_source(SOURCE, f"http://127.0.0.1:{PORT}", tmp_path / "again.parquet")
    assert (tmp_path / "deep" / "source.parquet").read_bytes() == (tmp_path / "again.parquet").read_bytes()
    table = pq.read_table(tmp_path / "again.parquet")
    assert table.column_names == ["url", "text"] and table.num_rows == 160
    known = truth(SOURCE)
    for n, item in enumerate(table.to_pylist()):
        assert row_of(item["url"], known).number == n and item["text"] == known[f"/p/{n:06d}.jpg"].text


def test_a_taken_port_is_one_line_and_exit_2(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    port = server.rsplit(":", 1)[1]
    assert main(["--count=5", f"--port={port}"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"port {port} is taken" in said
    assert main(["--count=5", "--port=99999"]) == 2 and capsys.readouterr().err.count("\n") == 1
    with pytest.raises(RuntimeError, match=f"port {port} is taken"), serve(ShapesSource(count=5), port=int(port)):
        pass


def test_the_server_ends_with_its_block_and_with_its_parent() -> None:
    script = (
        "import os, sys; from examples.shapes.server import serve; from examples.shapes.source import ShapesSource\n"
        "with serve(ShapesSource(count=5)) as url: print(url, flush=True); os._exit(9)"  # as if it was killed
    )
    died = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert died.returncode == 9
    port = int(died.stdout.strip().rsplit(":", 1)[1])
    for _ in range(200):
        with socket.socket() as asking:
            asking.settimeout(0.1)
            if asking.connect_ex(("127.0.0.1", port)):
                return
        time.sleep(0.1)
    pytest.fail("the server outlived its parent")


@pytest.mark.parametrize(
    "wrong", [{"count": 0}, {"missing": 1.5}, {"shares": (1.0,) * 5}, {"shares": (0.0,)}, {"missing": 0.9, "html": 0.2}]
)
def test_wrong_sources_are_refused(wrong: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="shapes source: "):
        ShapesSource(**wrong)
    if "count" in wrong:
        with pytest.raises(SystemExit) as ended:
            main(["--count=0"])
        assert ended.value.code == 2 and "count must be at least 1" in capsys.readouterr().err
