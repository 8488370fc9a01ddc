"""The download stage: digests that are expected, boxes that are blurred, rows judged anew without asking, conditions."""

from __future__ import annotations

import hashlib
import itertools
import pickle
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pyarrow as pa
import pytest

from pipeline.sample import sample_key
from pipeline.stage import check_stages
from stages.download import Download, DownloadConfig
from stages.fetch import FetchConfig
from tests.hostile_files import encode, every_file, noise, png, scene

FETCH = FetchConfig(allow_private_hosts=True, retries=0)
PICTURES = {  # by path: body, X-Robots-Tag
    "small": (encode(scene(64, 48)), ""),
    "other": (encode(noise(90, 70)), "noml"),
    "large": (encode(scene(200, 180)), "noai, noimageai"),
    "drawn": (encode(scene(100, 80), "PNG"), ""),
    "long": (encode(scene(150, 40)), ""),
    "shy-long": (encode(scene(150, 40)), "noai"),
    "tiny": (encode(scene(20, 30)), ""),
    "cut": (encode(noise(80, 70))[:-99], ""),
    "moving": (every_file()["gif of two frames"][0], ""),
    "bomb": (png(9000, 9000), ""),
    "text": (b"not found", ""),
    "gone": (b"", ""),
    "shy-gone": (b"", "noai"),
}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        name = self.path.strip("/")
        if name == "small" and self.headers.get("If-None-Match") == '"v1"':
            self.send_response(304)
            return self.end_headers()
        body, robots = PICTURES.get(name, (b"", ""))
        self.send_response(200 if body else 404)
        if name == "small":
            self.send_header("ETag", '"v1"')
        if robots:
            self.send_header("X-Robots-Tag", robots)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


def stage(*, opt_out: tuple[str, ...] = ("noai",), **changes: Any) -> Download:
    fetch = FetchConfig(allow_private_hosts=True, retries=0, opt_out=opt_out)
    return Download(DownloadConfig(**{"fetch": fetch, "min_edge": 32, "max_edge": 96, **changes}))


def rows_of(made: Download, url: str, names: Sequence[str], **columns: list[Any]) -> list[dict[str, Any]]:
    urls = [url + name for name in names]
    made.load()
    found = made.process(pa.table({"key": [sample_key(u) for u in urls], "url": urls, **columns}))
    return [dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True)]


def ends(rows: list[dict[str, Any]]) -> list[str | None]:
    return [row["reason"] for row in rows]


def test_what_is_known_of_each_row(url: str) -> None:
    rows = dict(zip(PICTURES, rows_of(stage(), url, list(PICTURES)), strict=True))
    reasons = {name: row["reason"] for name, row in rows.items() if row["reason"]}
    assert reasons == {"large": "opt_out", "long": "bad_aspect_ratio", "shy-long": "opt_out", "tiny": "too_small",
                       "cut": "truncated", "moving": "animated", "bomb": "truncated", "text": "not_an_image",
                       "gone": "http_404", "shy-gone": "http_404"}  # fmt: skip
    for name, (body, robots) in PICTURES.items():
        row, came = rows[name], bool(body) and reasons.get(name) != "opt_out"
        assert row["sha256"] == (hashlib.sha256(body).hexdigest() if came else None)
        assert row["directives"] == ",".join(sorted(robots.split(", "))) and row["transient"] is False
        assert len(row["pdq"] or b"") == (32 if row["status"] == "kept" else 0)
    assert (rows["tiny"]["original_width"], rows["tiny"]["original_height"]) == (20, 30)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"min_edge": 50},
    {"min_edge": 10, "max_aspect_ratio": 5.0},
    {"max_edge": 150},
    {"max_pixels": 5000},
    {"max_pixels": 200_000_000, "max_edge": 80},
    {"opt_out": ()},
    {"opt_out": ("noml", "noimageai")},
    {"opt_out": ("noml",), "min_edge": 72, "max_edge": 72},
    {"refresh": 1},
]


@pytest.fixture(scope="module")
def made(url: str) -> list[tuple[Download, list[dict[str, Any]]]]:
    stages = [stage(**settings) for settings in SETTINGS]
    return [(s, rows_of(s, url, list(PICTURES))) for s in stages]


@pytest.mark.parametrize(("before", "after"), list(itertools.product(range(len(SETTINGS)), repeat=2)))
def test_a_row_judged_anew_is_what_asking_again_gives(made: Any, before: int, after: int) -> None:
    (earlier, rows), (present, wanted) = made[before], made[after]
    for name, row, expected in zip(PICTURES, rows, wanted, strict=True):
        judged = present.revise(row, earlier.identity())
        assert judged in (None, expected), name
        if before == after:
            assert judged == row


def test_most_rows_need_no_asking(made: Any) -> None:
    (default, rows), later = made[0], [s for s, _ in made]
    asked = [
        [name for name, row in zip(PICTURES, rows, strict=True) if s.revise(row, default.identity()) is None]
        for s in later
    ]
    shy = ["large", "shy-long"]
    assert asked == [[], [], ["long", "tiny"], [], [], [], shy, shy[1:], ["large", "drawn", "shy-long"], list(PICTURES)]


def test_rows_taken_down_or_never_judged_stay(made: Any) -> None:
    present = stage(min_edge=60)
    blank = {**dict.fromkeys(Download.writes.names), "transient": False}
    for row in ({**blank, "status": "dropped", "reason": "taken_down"}, {**blank, "status": "failed", "reason": "dns"}):
        assert present.revise(row, made[0][0].identity()) == row


def test_revisable_settings_are_all_that_they_name() -> None:
    identity = stage().identity()
    for name in Download.revisable:
        value = identity
        for part in name.split("."):
            value = value[part]
    changed = {
        name: stage(**{name: value}).config_id for name, value in (("quality", 90), ("refresh", 1), ("min_edge", 9))
    }
    assert len({*changed.values(), stage().config_id}) == 4
    same = [{"decoders": 2}, {"decode_memory_mb": 99}, {"decode_seconds": 1.0}, {"batch_size": 3}]
    assert {stage(**changes).config_id for changes in same} == {stage().config_id}


def test_expected_digests(url: str) -> None:
    checked = stage(expected_sha256_column="digest")
    right = hashlib.sha256(PICTURES["small"][0]).hexdigest()
    names = ["small", "small", "small", "small", "tiny", "gone"]
    urls = [f"{n}?{i}" for i, n in enumerate(names)]
    assert checked.reads == ("url", "digest") and stage().reads == ("url",)
    assert checked.of_source == ("digest",)
    check_stages([checked])
    PICTURES.update({u: PICTURES[n] for u, n in zip(urls, names, strict=True)})
    rows = rows_of(checked, url, urls, digest=[right, f" {right.upper()} ", None, "0" * 64, "0" * 64, right])
    for name in urls:
        del PICTURES[name]
    assert ends(rows) == [None, None, None, "digest_mismatch", "digest_mismatch", "http_404"]
    assert (rows[3]["status"], rows[3]["sha256"], rows[3]["image"]) == ("dropped", right, None)


def test_boxes_that_are_none_drop_the_row(url: str) -> None:
    blurring = stage(blur_column="faces")
    names = ["small", "other", "drawn", "tiny"]
    boxes = [[[0.0, 0.0, 0.5, 0.5]], [], [[0.0, 0.0, 2.0, 1.0]], [[0.1]]]
    rows = rows_of(blurring, url, names, faces=boxes)
    assert ends(rows) == [None, None, "bad_boxes", "bad_boxes"]
    assert rows[0]["image"] != PICTURES["small"][0] and rows[1]["image"] == PICTURES["other"][0]


EARLIER = {
    "url": "u://1",
    "earlier_etag": '"x"',
    "earlier_last_modified": None,
    "earlier_sha256": "a" * 64,
    "earlier_width": 128,
    "earlier_height": 96,
    "earlier_original_width": 400,
    "earlier_original_height": 300,
    "digest": "a" * 64,
}


def test_only_a_picture_that_would_be_stored_again_is_asked_for_conditionally() -> None:
    assert stage().conditions(EARLIER) == ('"x"', None)
    assert stage(expected_sha256_column="digest").conditions(EARLIER) == ('"x"', None)
    assert stage().conditions({"url": "u://1"}) is None  # nothing is remembered
    for change in (
        {"earlier_etag": None},
        {"earlier_width": None, "earlier_height": None},  # it was dropped or failed
        {"earlier_original_width": 400, "earlier_original_height": 90},  # and would be now
        {"earlier_width": 80, "earlier_height": 60},  # it was made smaller than it would be now
    ):
        assert stage().conditions({**EARLIER, **change}) is None
    assert stage(max_edge=200).conditions(EARLIER) is None
    assert stage(resize_mode="border").conditions(EARLIER) is None
    assert stage(expected_sha256_column="digest").conditions({**EARLIER, "digest": "b" * 64}) is None


def test_what_has_not_changed_is_not_sent_again(url: str) -> None:
    names = ["small", "tiny", "drawn"]
    first = rows_of(stage(), url, names)
    assert [row["etag"] for row in first] == ['"v1"', None, None]
    earlier = {f"earlier_{column}": [row[column] for row in first] for column in Download.remembers}
    again = rows_of(stage(refresh=1), url, names, **earlier)
    assert [row["status"] for row in again] == ["unchanged", "dropped", "kept"] and again[2] == first[2]
    assert all(again[0][name] is None for name in ("image", "sha256", "width", "pdq", "reason"))


def test_a_stage_travels_to_its_worker(url: str) -> None:
    travelled = pickle.loads(pickle.dumps(stage(decoders=2)))
    assert ends(rows_of(travelled, url, ["small", "tiny", "drawn"])) == [None, "too_small", None]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"min_edge": 97}, "need 1 <= min_edge <= max_edge"),
        ({"quality": 0}, "quality must be 1 to 100"),
        ({"decoders": 0}, "decoders must be above 0"),
        ({"decode_seconds": 0.0}, "decode_seconds must be above 0"),
        ({"max_pixels": -1}, "max_pixels must be above 0"),
    ],
)
def test_mistakes_are_told_in_one_line(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        stage(**wrong)
