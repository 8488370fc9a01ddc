"""`--retry-failed`: rows whose failure may pass are tried again, and they alone; how often is kept beside the table."""

from __future__ import annotations

import io
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from pipeline.funnel import count_funnel
from pipeline.plan import Plan, make_plan
from pipeline.reasons import find_work
from pipeline.records import read_record
from pipeline.runner import run_plan
from pipeline.stage import Stage
from pipeline.storage import Folder
from pipeline.tables import read_table
from stages.deduplicate import Deduplicate, DeduplicateConfig
from stages.download import Download, DownloadConfig
from stages.fetch import FetchConfig
from stages.ingest import ingest
from tests.small_stages import small_source


class Site:
    """A server whose pages answer what `codes` says, by the first part of their path; it counts what it is asked."""

    def __init__(self) -> None:
        self.codes = {"ok": 200, "busy": 503, "later": 429, "gone": 404}
        self.asked: Counter[str] = Counter()
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                kind = self.path.split("/")[1]
                site.asked[kind] += 1
                self.send_response(site.codes.get(kind, 404))
                body = picture(self.path) if site.codes.get(kind) == 200 else b""
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def urls(self, kind: str, count: int) -> list[str]:
        return [f"http://127.0.0.1:{self.server.server_port}/{kind}/{n}" for n in range(count)]


def picture(path: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (40, 30), tuple(hash(path) >> s & 255 for s in (0, 8, 16))).save(out, "JPEG")
    return out.getvalue()


@pytest.fixture
def site() -> Iterator[Site]:
    made = Site()
    yield made
    made.server.shutdown()
    made.server.server_close()


def stages() -> tuple[Stage, ...]:
    fetch = FetchConfig(retries=0, timeout=5.0, allow_private_hosts=True, host_patience=1000, site_files=())
    return Download(DownloadConfig(fetch=fetch, min_edge=8)), Deduplicate(DeduplicateConfig())


def run(dataset: Folder, source, *, retry: bool = False) -> Plan:
    partitions = ingest(dataset, source)
    plan = make_plan(dataset, stages(), partitions, retry=retry)
    run_plan(dataset, stages(), plan, lambda _: None, runner="local")
    return make_plan(dataset, stages(), partitions)


def attempts(dataset: Folder, plan: Plan) -> Counter[tuple[str, int]]:
    """How often rows of each end were tried."""
    found: Counter[tuple[str, int]] = Counter()
    for ticket in plan.tickets:
        table = ticket.tables["download"]
        ends = {r["key"]: r["reason"] or r["status"] for r in read_table(dataset, table).to_pylist()}
        found.update((ends[r["key"]], r["attempts"]) for r in read_record(dataset, table).to_pylist())
    return found


def test_only_what_may_pass_is_tried_again(site: Site, tmp_path: Path) -> None:
    dataset = Folder(url=str(tmp_path / "data"))
    mixed = [*site.urls("ok", 5), *site.urls("busy", 3), *site.urls("gone", 2), *site.urls("later", 1)]
    source = small_source(tmp_path, mixed, partition_size=4)
    plan = run(dataset, source)
    assert plan.is_empty and site.asked == {"ok": 5, "busy": 3, "gone": 2, "later": 1}
    assert make_plan(dataset, stages(), ingest(dataset, source)).is_empty  # without being told to, nothing is

    site.codes["busy"], site.asked = 200, Counter()
    again = make_plan(dataset, stages(), ingest(dataset, source), retry=True)
    work = {w.stage.name: w for w in find_work(dataset, again)}
    assert work["download"].fresh == 4 and work["download"].reasons == {"retried rows": 2}
    assert work["deduplicate"].reasons == {"after download": 2}
    plan = run(dataset, source, retry=True)
    assert plan.is_empty and site.asked == {"busy": 3, "later": 1}
    funnel = count_funnel(dataset, stages(), plan.tickets)
    assert (funnel["download"].kept, funnel["download"].failed) == (8, {"http_404": 2, "http_429": 1})
    assert attempts(dataset, plan) == {("kept", 1): 5, ("kept", 2): 3, ("http_404", 1): 2, ("http_429", 2): 1}


def test_a_retry_that_fails_again_changes_nothing_but_the_count(site: Site, tmp_path: Path) -> None:
    dataset = Folder(url=str(tmp_path / "data"))
    source = small_source(tmp_path, [*site.urls("ok", 2), *site.urls("busy", 2)])
    before = run(dataset, source)
    after = run(dataset, source, retry=True)
    assert [t.tables for t in before.tickets] == [t.tables for t in after.tickets]
    assert attempts(dataset, after) == {("kept", 1): 2, ("http_5xx", 2): 2}


def test_what_a_retry_won_stays_when_the_table_is_made_again(site: Site, tmp_path: Path) -> None:
    """The elder table says that the row failed. A takedown of another row makes the partition's tables anew."""
    from dataclasses import replace

    dataset = Folder(url=str(tmp_path / "data"))
    source = small_source(tmp_path, [*site.urls("ok", 2), *site.urls("busy", 2)])
    run(dataset, source)
    site.codes["busy"] = 200
    run(dataset, source, retry=True)
    site.codes["busy"], site.asked = 503, Counter()
    (partition,) = ingest(dataset, source)
    shrunk = [replace(partition, content_id="another")]
    dataset.write(shrunk[0].parquet, dataset.read(partition.parquet))
    run_plan(dataset, stages(), make_plan(dataset, stages(), shrunk), lambda _: None, runner="local")
    plan = make_plan(dataset, stages(), shrunk)
    assert not site.asked and count_funnel(dataset, stages(), plan.tickets)["download"].kept == 4
