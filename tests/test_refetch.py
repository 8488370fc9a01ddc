"""A dataset whose download settings change: which servers are asked again, and that the rows are a new build's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from aiohttp import web

from jobs.build import check_source_columns
from pipeline.partitions import list_partitions
from pipeline.plan import Plan, make_plan
from pipeline.reasons import find_work
from pipeline.runner import run_plan
from pipeline.settings import write_settings
from pipeline.storage import Folder
from pipeline.tables import read_payloads, read_table
from stages.download import Download, DownloadConfig
from stages.fetch import FetchConfig
from stages.ingest import ingest
from stages.source import Source
from tests.hostile_files import encode, scene
from tests.web_server import serve_app

FETCH = FetchConfig(
    allow_private_hosts=True, site_files=(), retries=0, per_host_rate=1000.0, max_wait=0.1, opt_out=("noindex",)
)
CONFIG = DownloadConfig(fetch=FETCH, min_edge=16, max_edge=256, batch_size=4)


@dataclass
class Server:
    """Pictures of sides 20, 30, … 90; every third says noai."""

    port: int = 0
    asked: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)
    broken: bool = False
    says: str = ""

    async def answer(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        self.asked[name] += 1
        if self.broken:
            raise web.HTTPServiceUnavailable
        headers = {"ETag": f'"{name}"', **({"X-Robots-Tag": self.says} if self.says else {})}
        if int(name) % 3 == 0:
            headers["X-Robots-Tag"] = "noai"
        if any(tag.value == name for tag in request.if_none_match or ()):
            return web.Response(status=304, headers=headers)
        self.sent[name] += 1
        return web.Response(body=encode(scene(int(name) + 10, int(name))), headers=headers)

    def count(self) -> tuple[int, int]:
        """Pictures asked for and sent since the last count."""
        counted = self.asked.total(), self.sent.total()
        self.asked, self.sent = Counter(), Counter()
        return counted


@pytest.fixture
def server() -> Iterator[Server]:
    found, app = Server(), web.Application()
    app.router.add_get("/{name}", found.answer)
    with serve_app(app) as found.port:
        yield found


def build(folder: Path, server: Server, name: str = "dataset", **changes: Any) -> Plan:
    source = Source(path=str(folder / "source.parquet"), partition_size=5)
    if not Path(source.path).exists():
        urls = [f"http://127.0.0.1:{server.port}/{side}" for side in range(20, 100, 10)]
        pq.write_table(
            pa.table({"url": urls, "text": [""] * len(urls), "digest": ["0" * 64, *[None] * 7]}), source.path
        )
    dataset, stages = Folder(url=str(folder / name)), [Download(replace(CONFIG, **changes))]
    partitions = ingest(dataset, source)
    check_source_columns(dataset, stages, partitions)
    write_settings(dataset, stages)
    plan = make_plan(dataset, stages, partitions)
    fresh = find_work(dataset, plan)[0].fresh
    run_plan(dataset, stages, plan, lambda _: None, runner="local")
    assert server.asked.total() <= fresh, "a plan counts all that is asked for"
    return make_plan(dataset, stages, partitions)


def rows(folder: Path, plan: Plan, name: str = "dataset") -> list[dict[str, Any]]:
    """All rows, with their pictures in place of where these lie."""
    dataset, found = Folder(url=str(folder / name)), []
    for ticket in plan.tickets:
        table = read_table(dataset, ticket.tables["download"])
        there = table.filter(table.column("image_offset").is_valid())
        images = read_payloads(dataset, ticket.tables["download"], there, "image")
        by_key = dict(zip(there.column("key").to_pylist(), images, strict=True))
        for row in table.drop_columns(["image_offset", "image_size"]).to_pylist():
            found.append({**row, "image": by_key.get(row["key"])})
    return found


def noai(*more: str) -> FetchConfig:
    return replace(FETCH, opt_out=("noindex", "noai", *more))


@pytest.mark.parametrize(
    ("before", "after", "asked"),
    [
        ({}, {"min_edge": 55}, 0),  # a stricter limit
        ({"min_edge": 55}, {}, 4),  # a looser one: those that were too small
        ({}, {"fetch": noai()}, 0),  # a stricter policy
        ({"fetch": noai()}, {}, 3),  # a looser one: those that were refused
        ({"fetch": noai()}, {"fetch": noai(), "min_edge": 55}, 0),
        ({"min_edge": 55}, {"fetch": noai()}, 3),  # of the four that were too small one has said noai
    ],
)
def test_what_is_known_is_judged_anew(
    tmp_path: Path, server: Server, before: dict[str, Any], after: dict[str, Any], asked: int
) -> None:
    build(tmp_path, server, **before)
    server.count()
    changed = build(tmp_path, server, **after)
    assert server.count() == (asked, asked)
    assert rows(tmp_path, changed) == rows(tmp_path, build(tmp_path, server, "nothing", **after), "nothing")


def test_a_refresh_asks_everybody_and_is_sent_nothing(tmp_path: Path, server: Server) -> None:
    before = build(tmp_path, server)
    server.count()
    after = build(tmp_path, server, refresh=1)
    assert server.count() == (8, 0) and rows(tmp_path, after) == rows(tmp_path, before)
    server.says = "noml"
    said = build(tmp_path, server, refresh=2)
    assert {row["directives"] for row in rows(tmp_path, said)} == {"noml", "noai"}, "what a 304 says counts"


def test_a_server_that_is_down_costs_no_picture(tmp_path: Path, server: Server) -> None:
    before = rows(tmp_path, build(tmp_path, server))
    server.broken = True
    server.count()
    assert rows(tmp_path, build(tmp_path, server, refresh=1)) == before


def test_a_column_of_the_source_is_read(tmp_path: Path, server: Server) -> None:
    found = rows(tmp_path, build(tmp_path, server, expected_sha256_column="digest"))
    assert [row["reason"] for row in found] == ["digest_mismatch", *[None] * 7]
    dataset = Folder(url=str(tmp_path / "dataset"))
    wrong = [Download(replace(CONFIG, expected_sha256_column="digset"))]
    with pytest.raises(ValueError, match=r"stage 'download' reads 'digset', which the source does not have.*digest"):
        check_source_columns(dataset, wrong, list_partitions(dataset))
