"""The stages one by one: what each decides of a row, and that no row is ever lost."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from examples.shapes.server import serve
from examples.shapes.source import BEHAVIOURS, Row, ShapesSource, picture, rows
from pipeline.sample import sample_key
from pipeline.stage import Columns
from stages.download import Download, DownloadConfig
from stages.fetch import FetchConfig


def rows_of(columns: Columns) -> list[dict[str, Any]]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


# -- download ----------------------------------------------------------------------------------------------------------

WORLD = ShapesSource(count=120, seed=6, **{name: 0.06 for name in BEHAVIOURS[1:] if name != "slow"}, slow=0.0)
ENDS = {
    "missing": ("failed", "http_404"),
    "truncated": ("failed", "truncated"),
    "html": ("failed", "not_an_image"),
    "opt_out": ("dropped", "opt_out"),
    "tiny": ("dropped", "too_small"),
}


def download(**changes: Any) -> Download:
    fetch = FetchConfig(allow_private_hosts=True, timeout=30.0, retries=1, backoff=0.01, per_host_rate=1000.0)
    stage = Download(DownloadConfig(**{"fetch": fetch, "min_edge": 16, "max_edge": 64, **changes}))
    stage.load()
    return stage


@pytest.fixture(scope="module")
def downloaded() -> Iterator[list[tuple[Row, dict[str, Any]]]]:
    """Every row of the world with what the stage wrote for it; the last three URLs are nobody's."""
    with serve(WORLD) as base:
        urls = [base + row.path for row in rows(WORLD)] + [f"{base}/nobody.jpg", "ftp://x/y.jpg", "http://"]
        made = rows_of(download().process(pa.table({"key": [sample_key(u) for u in urls], "url": urls})))
    assert len(made) == len(urls)
    assert [(r["status"], r["reason"]) for r in made[-3:]] == [
        ("failed", "http_404"), ("failed", "bad_scheme"), ("failed", "bad_url")
    ]  # fmt: skip
    yield list(zip(rows(WORLD), made))


def test_download_gives_every_row_a_typed_end(downloaded: list[tuple[Row, dict[str, Any]]]) -> None:
    seen = set()
    for row, made in downloaded:
        assert (made["status"], made["reason"]) == ENDS.get(row.behaviour, ("kept", None)), row
        assert set(made) == {*Download.writes.names, "image", "status", "reason", "transient"}
        kept = made["status"] == "kept"
        assert all((made[c] is not None) == kept for c in ("image", "width", "height", "pdq", "pdq_quality"))
        assert (made["original_width"] is not None) == (kept or row.behaviour in ("truncated", "tiny"))
        assert (made["sha256"] is not None) == (row.behaviour not in ("missing", "opt_out"))
        seen.add(row.behaviour)
    assert seen == set(BEHAVIOURS) - {"slow"}


def test_download_keeps_what_was_served(downloaded: list[tuple[Row, dict[str, Any]]]) -> None:
    for row, made in downloaded:
        if made["status"] == "kept":
            served = picture(WORLD, row)
            assert made["sha256"] == hashlib.sha256(served).hexdigest() and made["http_status"] == 200
            image = Image.open(io.BytesIO(made["image"]))
            assert image.size == (made["width"], made["height"]) and image.mode == "RGB"
            before = Image.open(io.BytesIO(served)).size
            assert min(image.size) == min(64, *before)
            if min(before) <= 64:
                assert made["image"] == served  # not compressed a second time


def test_download_tells_which_failures_may_pass() -> None:
    rows = rows_of(download().process(pa.table({"key": ["a", "b"], "url": ["http://127.0.0.1:9/x", "gopher://x/"]})))
    assert [(r["status"], r["reason"], r["transient"]) for r in rows] == [
        ("failed", "connection", True), ("failed", "bad_scheme", False)
    ]  # fmt: skip


def test_download_is_redone_for_another_size_but_not_for_more_patience() -> None:
    ids = [
        Download(DownloadConfig(**c)).config_id for c in ({}, {"fetch": FetchConfig(timeout=99.0)}, {"max_edge": 999})
    ]
    assert ids[0] == ids[1] != ids[2]
    with pytest.raises(ValueError, match="need 1 <= min_edge <= max_edge"):
        DownloadConfig(min_edge=9, max_edge=8)
