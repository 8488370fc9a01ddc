"""A query to a running clip-retrieval server → a source table, for images that somebody has indexed already.

Its `/knn-service` answers with the nearest rows of its index: url, caption and similarity of as many as are asked for. Each text
or picture is one request; the same URL found twice is one row, with its highest similarity. What the rows name is fetched
later, by the build and under its rules: here nothing but the server is asked.
"""

from __future__ import annotations

import asyncio
import base64
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import aiohttp
import pyarrow as pa
from yarl import URL

MODALITIES = {"picture": "image", "caption": "text"}
CONNECT = 10.0  # seconds to open a connection
SCHEMA = pa.schema([("url", pa.string()), ("text", pa.string()), ("similarity", pa.float32()), ("query", pa.string())])


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """Which server, and what of its answers is taken."""

    back: str = "http://127.0.0.1:1234"
    """The server's address, as clip-retrieval's `back` or `densebridge search --serve` gives it."""
    index: str = ""
    """Which of its indices; the first that it names if empty."""
    by: Literal["picture", "caption"] = "picture"
    """What the queries are held against."""
    count: int = 1000
    """The most rows of each query."""
    min_similarity: float = -1.0
    """Rows below it are left out: a cosine."""
    timeout: float = 60.0
    """Seconds for an answer, to its last byte."""
    max_mb: float = 64.0
    """The most megabytes that an answer may have, and that a picture may be sent with."""

    def __post_init__(self) -> None:
        url = URL(self.back)
        if url.scheme not in ("http", "https") or not url.host or url.user or url.query_string:
            raise ValueError(f"back looks like http://127.0.0.1:1234, got {self.back!r}")
        if self.count < 1 or self.timeout <= 0 or self.max_mb <= 0:
            raise ValueError("count must be at least 1, timeout and max_mb above 0")


@dataclass(frozen=True, kw_only=True)
class Query:
    """What is looked for: a text, or the bytes of a picture."""

    name: str
    """Names it in the table: the text itself, or the picture's file."""
    picture: bytes | None = None


@dataclass(frozen=True, kw_only=True)
class Retrieved:
    """What was answered."""

    table: pa.Table
    """url, text (the index's caption), similarity and query of each row, the most similar first; URLs once."""
    skipped: int
    """Rows that name no http(s) URL."""


def read_query(path: Path, config: RetrievalConfig) -> Query:
    """A picture to look for. Raises FileNotFoundError, or ValueError where it is too large to send."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    if path.stat().st_size > config.max_mb * 1e6:
        raise ValueError(f"{path} has more than {config.max_mb:g} MB: make it smaller, or raise max_mb")
    return Query(name=path.name, picture=path.read_bytes())


def retrieve(config: RetrievalConfig, queries: Sequence[Query]) -> Retrieved:
    """Asks for all of them. Raises OSError where the server does not answer, ValueError where it answers something else."""
    return asyncio.run(_retrieve(config, queries))


async def _retrieve(config: RetrievalConfig, queries: Sequence[Query]) -> Retrieved:
    timeout = aiohttp.ClientTimeout(total=config.timeout, sock_connect=CONNECT)
    async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as session:
        indices = await _ask(session, config, "indices-list")
        if not isinstance(indices, list) or not all(isinstance(name, str) for name in indices) or not indices:
            raise ValueError(f"{config.back} names no index: is it a clip-retrieval server?")
        index = config.index or indices[0]
        if index not in indices:
            raise ValueError(f"{config.back} has no index {index!r}: it has {', '.join(indices)}")
        best: dict[str, tuple[float, str, str]] = {}
        skipped = 0
        for query in queries:
            for row in await _ask(session, config, "knn-service", _request(config, index, query)):
                url, text, similarity = _read_row(config, row)
                if not url.startswith(("http://", "https://")):
                    skipped += 1
                elif similarity >= config.min_similarity and similarity > best.get(url, (-math.inf,))[0]:
                    best[url] = (similarity, text, query.name)
    rows = sorted(((url, text, s, name) for url, (s, text, name) in best.items()), key=lambda row: (-row[2], row[0]))
    columns = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in SCHEMA]
    return Retrieved(table=pa.table(columns, schema=SCHEMA), skipped=skipped)


def _request(config: RetrievalConfig, index: str, query: Query) -> dict[str, Any]:
    """All fields, as the server takes some that are left out for a fault of its own."""
    return {
        "text": query.name if query.picture is None else None,
        "image": None if query.picture is None else base64.b64encode(query.picture).decode(),
        "image_url": None,
        "embedding_input": None,
        "modality": MODALITIES[config.by],
        "num_images": config.count,  # only so many come with their metadata
        "num_result_ids": config.count,
        "indice_name": index,
        "deduplicate": False,
        "use_safety_model": False,
        "use_violence_detector": False,
        "use_mclip": False,
        "aesthetic_score": "",
        "aesthetic_weight": "",
    }


async def _ask(
    session: aiohttp.ClientSession, config: RetrievalConfig, name: str, body: dict[str, Any] | None = None
) -> Any:
    """What the server answers; a list, for a query."""
    address, most = f"{config.back.rstrip('/')}/{name}", int(config.max_mb * 1e6)
    method = "GET" if body is None else "POST"
    try:
        async with session.request(method, address, json=body, allow_redirects=False) as response:
            data = bytearray()
            async for chunk in response.content.iter_any():
                data += chunk
                if len(data) > most:
                    raise ValueError(f"{address} sends more than {config.max_mb:g} MB: lower count, or raise max_mb")
            if response.status != 200:
                said = " ".join(data[:300].decode(errors="replace").split())
                raise ValueError(
                    f"{address} answers {response.status} ({said or response.reason}): is it a clip-retrieval server?"
                )
    except TimeoutError:
        raise TimeoutError(f"{address} does not answer within {config.timeout:g} s") from None
    except aiohttp.ClientError as error:
        raise OSError(f"{address} does not answer ({error}): start it, or correct its address") from None
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError(f"{address} answers something else than JSON: is it a clip-retrieval server?") from None
    if not isinstance(found, list):
        raise ValueError(f"{address} answers no list: is it a clip-retrieval server?")
    return found


def _read_row(config: RetrievalConfig, row: Any) -> tuple[str, str, float]:
    """URL and text (empty where there is none) and similarity."""
    similarity = row.get("similarity") if isinstance(row, dict) else None
    if not isinstance(similarity, int | float) or not math.isfinite(similarity):
        raise ValueError(f"{config.back} answers rows without a similarity: is it a clip-retrieval server?")
    url, text = (row.get(name) for name in ("url", "caption"))
    clean = [value.encode(errors="replace").decode() if isinstance(value, str) else "" for value in (url, text)]
    return clean[0].strip(), clean[1], float(similarity)
