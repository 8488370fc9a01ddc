"""url → image: a JPEG of at most `max_edge` pixels, its size, the digest of what came, and what the server said.

The fetch is ours (`fetch.py`), the resize img2dataset's. A failed fetch or an unusable picture is a row with a reason.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipeline.stage import Columns, Needs, Stage

from .fetch import MANNERS, FetchConfig, Fetched, fetch
from .pictures import Refusal, check_picture, shrinker


@dataclass(frozen=True, kw_only=True)
class DownloadConfig:
    """What to ask for and what to accept."""

    fetch: FetchConfig = field(default_factory=FetchConfig)
    """How URLs are fetched: identity, deadlines, caps, politeness, which hosts."""
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
    batch_size: int = 256
    """URLs fetched at a time; also the most undecoded pictures in memory."""
    needs: Needs = field(default_factory=lambda: Needs(cpus=1.0, actors=(1, 8)))
    """What an actor takes."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_edge <= self.max_edge:
            raise ValueError(f"need 1 <= min_edge <= max_edge, got {self.min_edge} and {self.max_edge}")


class Download(Stage):
    """Reads url; writes the image beside width, height, sha256 and what the server answered."""

    name = "download"
    reads = ("url",)
    writes = pa.schema(
        [
            ("width", pa.int32()),
            ("height", pa.int32()),
            ("sha256", pa.string()),
            ("http_status", pa.int32()),
            ("opt_out", pa.string()),
        ]
    )
    payload = {"image": "jpg"}
    recorded = True
    config: DownloadConfig

    def identity(self) -> Any:
        """The settings but for those that only change who asks, how fast and how patiently."""
        settings = super().identity()
        return {**settings, "fetch": {k: v for k, v in settings["fetch"].items() if k not in MANNERS}}

    def load(self) -> None:
        """Makes img2dataset's Resizer: short side to `max_edge` at most, ratio kept, JPEG out."""
        self._resize = shrinker(self.config.max_edge, self.config.quality)

    def process(self, batch: pa.Table) -> Columns:
        """Fetches the batch's URLs together, then checks and resizes what came."""
        fetched = fetch(batch.column("url").to_pylist(), self.config.fetch)
        rows = [self._row(f) for f in fetched]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def _row(self, fetched: Fetched) -> dict[str, Any]:
        row: dict[str, Any] = dict.fromkeys(("width", "height", "sha256", "image"))
        row |= {"status": fetched.status, "reason": fetched.reason, "transient": fetched.transient}
        row |= {"http_status": fetched.http_status, "opt_out": fetched.directives}
        return row if fetched.status != "ok" or fetched.data is None else row | self.picture_row(fetched.data)

    def picture_row(self, data: bytes) -> dict[str, Any]:
        """What the stage makes of a picture's bytes, wherever they came from: image, width, height, sha256, status, reason."""
        row: dict[str, Any] = dict.fromkeys(("width", "height", "sha256", "image"))
        config = self.config
        picture = check_picture(
            data,
            min_edge=config.min_edge,
            max_pixels=config.max_pixels,
            max_aspect_ratio=config.max_aspect_ratio,
        )
        if isinstance(picture, Refusal):
            broken = picture.reason in ("not_an_image", "truncated")
            return row | {"status": "failed" if broken else "dropped", "reason": picture.reason}
        image, width, height, _, _, error = self._resize(io.BytesIO(picture.data))
        if error:
            return row | {"status": "failed", "reason": "not_an_image"}
        digest = hashlib.sha256(data).hexdigest()
        found = {"image": image, "width": width, "height": height, "sha256": digest}
        return row | found | {"status": "kept", "reason": None}
