"""url → image: a JPEG of at most `max_edge` pixels, its size, digests of what came, and what the server said.

`fetch.py` asks, `decoder.py` decodes in processes that may die: each picture as soon as it has come, while others are on
their way. A failed fetch or an unusable picture is a row with a reason.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipeline.stage import Columns, Needs, Stage

from .decoder import Decoders
from .fetch import MANNERS, FetchConfig, Fetched, Fetcher, Validators, refused_by
from .pictures import SIZE_REASONS, Box, PictureRules, ResizeMode

_ANSWER = ("http_status", "directives", "etag", "last_modified")
_UNUSABLE = ("not_an_image", "truncated")  # failed, and will be again
_MOST_BOXES = 500
_TOO_MUCH = ("decode_memory", "decode_timeout", "decode_died")  # failed; with larger limits it may not


@dataclass(frozen=True, kw_only=True)
class DownloadConfig:
    """What to ask for and what to accept."""

    fetch: FetchConfig = field(default_factory=FetchConfig)
    """How URLs are fetched: identity, deadlines, caps, politeness, which hosts."""
    refresh: int = 0
    """Raise it to ask every server again. What has not changed since is not sent again, where the server can tell; and where
    none answers now, the picture that is there stays."""
    expected_sha256_column: str | None = None
    """A column of the source with the SHA-256 that a picture is known by: what comes otherwise is dropped. Rows without one
    are not checked."""
    min_edge: int = 256
    """Shorter side in pixels below which a picture is dropped."""
    max_edge: int = 1536
    """Shorter side in pixels above which a picture is scaled down to it (area interpolation)."""
    max_pixels: int = 100_000_000
    """Pixels above which a picture is dropped before it is decoded."""
    max_aspect_ratio: float = 3.0
    """Longer over shorter side above which a picture is dropped."""
    quality: int = 95
    """JPEG quality of what had to be scaled or converted; other pictures keep their bytes."""
    resize_mode: ResizeMode = "keep_ratio"
    """As img2dataset names them: any but the first is its own doing, to `max_edge` pixels."""
    blur_column: str | None = None
    """A column of the source with boxes to blur (faces, plates), each [left, top, right, bottom] as shares of the upright
    picture; img2dataset does it."""
    decoders: int = 1
    """Processes that decode, for each actor."""
    decode_memory_mb: int = 1536
    """Memory for one picture, beside a decoder's own 60. 100 megapixels take up to 1,450 (a PNG with alpha)."""
    decode_seconds: float = 20.0
    """Processor time for one picture. 100 megapixels take up to 4."""
    batch_size: int = 256
    """URLs fetched at a time. Undecoded, at most `fetch.concurrency` and 16 more pictures are in memory."""
    needs: Needs = field(default_factory=lambda: Needs(cpus=1.0, memory_gb=3.0, actors=(1, 8)))
    """What an actor takes."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_edge <= self.max_edge:
            raise ValueError(f"need 1 <= min_edge <= max_edge, got {self.min_edge} and {self.max_edge}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality must be 1 to 100, got {self.quality}")
        for name in ("max_pixels", "max_aspect_ratio", "decoders", "decode_memory_mb", "decode_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")


class Download(Stage):
    """Reads url; writes the image beside its sizes, digests and what the server answered."""

    name = "download"
    writes = pa.schema(
        [
            ("width", pa.int32()),
            ("height", pa.int32()),
            ("original_width", pa.int32()),
            ("original_height", pa.int32()),
            ("sha256", pa.string()),
            ("pdq", pa.binary()),
            ("pdq_quality", pa.int16()),
            ("http_status", pa.int32()),
            ("directives", pa.string()),
            ("etag", pa.string()),
            ("last_modified", pa.string()),
        ]
    )
    payload = {"image": "jpg"}
    recorded = True
    revisable = ("refresh", "fetch.opt_out", "min_edge", "max_edge", "max_pixels", "max_aspect_ratio")
    restates = ("directives", "etag", "last_modified")
    remembers = ("etag", "last_modified", "sha256", "width", "height", "original_width", "original_height")
    not_fingerprinted = (*Stage.not_fingerprinted, "decoders", "decode_memory_mb", "decode_seconds")
    config: DownloadConfig

    def __init__(self, config: DownloadConfig) -> None:
        super().__init__(config)
        self.reads = ("url", *self.of_source)

    @property
    def of_source(self) -> tuple[str, ...]:
        """The columns with digests and boxes."""
        return tuple(c for c in (self.config.expected_sha256_column, self.config.blur_column) if c)

    def identity(self) -> Any:
        """The settings but for those that only change who asks, how fast and how patiently."""
        settings = super().identity()
        fetch = {k: v for k, v in settings["fetch"].items() if k not in MANNERS}
        return {**settings, "fetch": {**fetch, "opt_out": sorted(fetch["opt_out"])}}

    @property
    def rules(self) -> PictureRules:
        """What the decoders are told."""
        config = self.config
        return PictureRules(
            min_edge=config.min_edge,
            max_edge=config.max_edge,
            max_pixels=config.max_pixels,
            max_aspect_ratio=config.max_aspect_ratio,
            quality=config.quality,
            resize_mode=config.resize_mode,
            blur=config.blur_column is not None,
        )

    def load(self) -> None:
        """Makes room for the decoders; each starts with its first picture."""
        config = self.config
        self._decoders = Decoders(
            self.rules, count=config.decoders, memory_mb=config.decode_memory_mb, seconds=config.decode_seconds
        )
        self._threads = ThreadPoolExecutor(config.decoders, thread_name_prefix="decoder")
        self._fetcher: Fetcher | None = None

    def check_rows(self, rows: int) -> None:
        """Raises ValueError where servers would be asked by somebody who gives no contact."""
        if rows:
            self.config.fetch.check_contact()

    def process(self, batch: pa.Table) -> Columns:
        """Fetches the batch's URLs together; each picture is decoded while others are still on their way."""
        wanted = {row["url"]: row for row in batch.to_pylist()}

        async def row_of(fetched: Fetched) -> dict[str, Any]:
            row = wanted[fetched.url]
            if fetched.data is None:
                return self._row(fetched, row)
            return await asyncio.get_running_loop().run_in_executor(self._threads, self._row, fetched, row)

        self._fetcher = self._fetcher or Fetcher(self.config.fetch)  # for all batches: it knows the hosts
        conditions = {url: self.conditions(row) for url, row in wanted.items()}
        rows = self._fetcher.fetch(batch.column("url").to_pylist(), row_of, conditions=conditions)
        return {name: [row[name] for row in rows] for name in rows[0]}

    def picture_row(self, data: bytes) -> dict[str, Any]:
        """What the stage makes of a picture's bytes, wherever they came from: image, sizes, digests, status, reason."""
        return {"sha256": hashlib.sha256(data).hexdigest(), **self._decoded(data, ())}

    def revise(self, row: Mapping[str, Any], settings: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The row under the present limits and opt-outs; None where the server must be asked (again)."""
        config = self.config
        if settings["refresh"] < config.refresh:
            return None
        said = row["directives"] or ""
        refused = refused_by(said, config.fetch.opt_out)
        if row["reason"] == "opt_out":
            return row if refused else None
        if row["reason"] == "robots_unreachable" and settings["fetch"]["opt_out"] != sorted(config.fetch.opt_out):
            return None  # whether that file counts may have changed
        if refused and row["sha256"]:
            return _without_picture(row, "opt_out", keep=_ANSWER)
        if refused and not refused_by(said, settings["fetch"]["opt_out"]):  # said by what failed, or by what led there?
            return None
        if row["original_width"] is None:
            return row
        if reason := self.rules.refuse_size(row["original_width"], row["original_height"]):
            return _without_picture(row, reason, keep=(*_ANSWER, "sha256", "original_width", "original_height"))
        if row["reason"] in SIZE_REASONS:
            return None
        edges = {config.max_edge, settings["max_edge"]}
        fits = config.resize_mode == "keep_ratio" and min(row["original_width"], row["original_height"]) <= min(edges)
        return row if len(edges) == 1 or fits or row["status"] != "kept" else None

    def conditions(self, row: Mapping[str, Any]) -> Validators | None:
        """ETag and Last-Modified by which a URL may be asked whether it has changed, from what the stage remembers of it.
        None where it must be sent in any case.
        """
        validators = row.get("earlier_etag"), row.get("earlier_last_modified")
        return validators if any(validators) and self._stands(row) else None

    def _stands(self, row: Mapping[str, Any]) -> bool:
        """Whether the picture that the stage remembers is the one that would be stored now, if it is still the same."""
        width, height = row.get("earlier_original_width"), row.get("earlier_original_height")
        if not row.get("earlier_width") or not width or not height:
            return False
        short = min(row["earlier_width"], row["earlier_height"])
        stored = self.config.resize_mode == "keep_ratio" and short == min(width, height, self.config.max_edge)
        return (
            stored and not self.is_unexpected(row["earlier_sha256"], row) and not self.rules.refuse_size(width, height)
        )

    def is_unexpected(self, digest: str, row: Mapping[str, Any]) -> bool:
        """Whether the source names another SHA-256 for this row."""
        column = self.config.expected_sha256_column
        expected = str(row[column] or "").strip().lower() if column else ""
        return expected not in ("", digest)

    def _row(self, fetched: Fetched, wanted: Mapping[str, Any]) -> dict[str, Any]:
        row = dict.fromkeys((*self.writes.names, *self.payload)) | _answer(fetched)
        if fetched.transient and self._stands(wanted):
            return row | {"status": "unchanged"}  # a server that is down now costs no picture that is there
        if fetched.data is None:
            return row
        digest = hashlib.sha256(fetched.data).hexdigest()
        boxes = _boxes(wanted[self.config.blur_column]) if self.config.blur_column else ()
        if boxes is None or self.is_unexpected(digest, wanted):
            reason = "bad_boxes" if boxes is None else "digest_mismatch"
            return row | {"status": "dropped", "reason": reason, "sha256": digest}
        return {**row, "sha256": digest, **self._decoded(fetched.data, boxes)}

    def _decoded(self, data: bytes, boxes: Sequence[Box]) -> dict[str, Any]:
        picture = self._decoders.decode(data, boxes)
        names = ("image", "width", "height", "original_width", "original_height", "pdq", "pdq_quality", "reason")
        failed = picture.reason in (*_UNUSABLE, *_TOO_MUCH)
        status = "kept" if picture.reason is None else "failed" if failed else "dropped"
        row = {name: getattr(picture, name) for name in names}
        return {**row, "status": status, "transient": picture.reason in _TOO_MUCH}


def _answer(fetched: Fetched) -> dict[str, Any]:
    """What a fetch says of a row by itself."""
    return {
        "status": "kept" if fetched.status == "ok" else fetched.status,
        "reason": fetched.reason or None,
        "transient": fetched.transient,
        "http_status": fetched.http_status,
        "directives": fetched.directives,
        "etag": fetched.etag or None,
        "last_modified": fetched.last_modified or None,
    }


def _without_picture(row: Mapping[str, Any], reason: str, keep: Sequence[str]) -> dict[str, Any]:
    blank = {**dict.fromkeys((*Download.writes.names, *Download.payload)), **{name: row[name] for name in keep}}
    return {**blank, "status": "dropped", "reason": reason, "transient": False}


def _boxes(value: Any) -> tuple[Box, ...] | None:
    """Boxes as the source has them; None where they are not four shares each, or too many for a picture."""
    try:
        boxes = [tuple(float(share) for share in box) for box in value or ()]
    except (TypeError, ValueError):
        return None
    fine = len(boxes) <= _MOST_BOXES and all(
        len(box) == 4 and all(math.isfinite(s) and 0 <= s <= 1 for s in box) for box in boxes
    )
    return tuple((b[0], b[1], b[2], b[3]) for b in boxes) if fine else None
