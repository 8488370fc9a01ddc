"""Takedowns: nothing is left of what goes, nothing changes of what stays, and what is interrupted goes on to the same end."""

from __future__ import annotations

import hashlib
import io
import itertools
import multiprocessing
import os
import shutil
import signal
import uuid
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline import takedown, tombstones
from pipeline.captions import TokenizerConfig
from pipeline.partitions import list_partitions
from pipeline.plan import Plan, make_plan
from pipeline.records import read_record
from pipeline.runner import run_plan
from pipeline.sample import sample_key
from pipeline.shards import View
from pipeline.stage import Columns, Stage
from pipeline.storage import Folder
from pipeline.tables import list_tables, parquet_bytes
from pipeline.takedown import Takedown, take_down
from pipeline.takedown_tables import Removed, Rewritten
from pipeline.tombstones import Tombstones, read_tombstones, write_tombstones
from stages.deduplicate import Deduplicate, DeduplicateConfig
from stages.ingest import ingest
from stages.pack import Pack, PackConfig
from stages.publish import publish_view
from tests.small_stages import Small, SmallConfig, small_source


@cache
def jpeg(number: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (number * 9 % 256, number % 256, 90)).save(out, "JPEG")
    return out.getvalue()


def sha256_of(number: int) -> str:
    return hashlib.sha256(jpeg(number)).hexdigest()


def number_of(url: str) -> int:
    return int(url.rsplit("/", 1)[1])


class Camera(Small):
    """url → the picture of its last number; `gone` fails."""

    name = "camera"
    reads = ("url",)
    writes = pa.schema([("width", pa.int32()), ("height", pa.int32()), ("sha256", pa.string())])
    payload = {"image": "jpg"}
    recorded = True

    def process(self, batch: pa.Table) -> Columns:
        self.note(batch)
        urls = batch.column("url").to_pylist()
        gone = ["gone" in url for url in urls]
        numbers = [None if g else number_of(u) for u, g in zip(urls, gone)]
        return {
            "image": [None if n is None else jpeg(n) for n in numbers],
            "width": [None if n is None else 8 for n in numbers],
            "height": [None if n is None else 8 for n in numbers],
            "sha256": [None if n is None else sha256_of(n) for n in numbers],
            "status": ["failed" if g else "kept" for g in gone],
            "reason": ["http_404" if g else None for g in gone],
        }


class Talker(Small):
    """image → a caption, its scores and its tokens."""

    name = "talker"
    reads = ("image",)
    writes = pa.schema(
        [
            ("caption", pa.string()),
            ("clip_score", pa.float32()),
            ("alt_score", pa.float32()),
            ("alt_supported", pa.bool_()),
            ("tokens_t5", pa.list_(pa.int32())),
        ]
    )
    drops = False

    def process(self, batch: pa.Table) -> Columns:
        self.note(batch)
        images = batch.column("image").to_pylist()
        told = [hashlib.md5(image).hexdigest() for image in images]
        return {
            "caption": [f"picture {t}{self.config.suffix}" for t in told],
            "clip_score": [0.5] * len(told),
            "alt_score": [None] * len(told),
            "alt_supported": [True] * len(told),
            "tokens_t5": [list(t.encode()[:4]) for t in told],
        }


class World:
    """A folder with a source and a dataset, and how it is built."""

    def __init__(self, root: Path, url: str | None = None, suffix: str = "") -> None:
        self.root, self.dataset = root, Folder(url=url or str(root / "data"))
        self.calls = root / "calls"
        (root / "tokenizer").mkdir(parents=True, exist_ok=True)
        (root / "tokenizer" / "tokenizer.json").write_text("{}")
        config = SmallConfig(calls=str(self.calls), suffix=suffix)
        tokenizer = TokenizerConfig(name="t5", model=str(root / "tokenizer"))
        self.pack = Pack(PackConfig(view="v", resolution=8, tokenizers=(tokenizer,)))
        self.stages: list[Stage] = [Camera(config), Deduplicate(DeduplicateConfig()), Talker(config), self.pack]

    def build(self, urls: Iterable[str], size: int = 5) -> Plan:
        """Returns the empty plan. Ingest keeps the source's own partitions."""
        self.calls.unlink(missing_ok=True)
        partitions = ingest(self.dataset, small_source(self.root, list(urls), size))
        run_plan(
            self.dataset, self.stages, make_plan(self.dataset, self.stages, partitions), lambda _: None, runner="local"
        )
        plan = make_plan(self.dataset, self.stages, partitions)
        publish_view(self.dataset, self.pack, plan.tickets)
        return plan

    def computed(self) -> Counter[str]:
        """Rows that the last build computed, by stage."""
        lines = self.calls.read_text().splitlines() if self.calls.exists() else []
        return Counter(line.split()[0] for line in lines)

    def forget(self, *urls: str, **more: Any) -> Takedown:
        return take_down(self.dataset, Tombstones(keys=frozenset(map(sample_key, urls)), **more))


def packed(dataset: Folder) -> dict[str, tuple[bytes, ...]]:
    """All that the view's present version holds, by key."""
    view = View.open(dataset, "v")
    keys = view.manifest.column("key").to_pylist()
    assert len(view) == len(keys) == len(set(keys))
    return {key: tuple(view.read(row, m) for m in ("image", "json", "tokens_t5")) for row, key in enumerate(keys)}


def digests(root: Path) -> dict[str, str]:
    """Of every file, hidden ones too."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def words(root: Path) -> str:
    """All that the dataset's files say, tombstones apart, in one text; bytes of tars as Latin-1."""
    told = []
    for path in sorted(p for p in root.rglob("*") if p.is_file() and p.parent.name != "tombstones"):
        told.append(
            str(pq.read_table(path).to_pylist()) if path.suffix == ".parquet" else path.read_bytes().decode("latin1")
        )
    return "\n".join(told)


# Numbers repeat: /3 on b is a duplicate of /3 on a.
URLS = [f"https://{host}.example/{n}" for n in range(9) for host in ("a", "b") if host == "a" or n % 3 == 0]
URLS += ["https://gone.example/99", "https://img.pics.a.example/20"]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("template")
    assert World(root).build(URLS).is_empty
    return root


@pytest.fixture
def world(tmp_path: Path, template: Path) -> World:
    shutil.copytree(template, tmp_path / "world")
    return World(tmp_path / "world")


def test_nothing_is_left_and_the_rest_is_untouched_before_any_build(world: World) -> None:
    gone = "https://a.example/4"
    before, files = packed(world.dataset), digests(Path(world.dataset.url))
    key = sample_key(gone)
    assert key in before and all(
        word in words(Path(world.dataset.url)) for word in (key, gone, jpeg(4).decode("latin1"))
    )
    done = world.forget(gone)
    assert not any(word in words(Path(world.dataset.url)) for word in (key, gone, jpeg(4).decode("latin1")))
    assert packed(world.dataset) == {k: members for k, members in before.items() if k != key}
    assert done.check and done.check.left == () and done.check.files > 10
    assert done.removed["partitions"].rows == 1 and done.removed["views (manifests)"].rows == 1
    camera = done.removed[world.stages[0].folder]
    assert camera.files == 3 and camera.rows == 1 and camera.bytes > len(jpeg(4))  # parquet, tar, record
    held = next(p.name for p in list_partitions(world.dataset) if p.has_shrunk)
    after = digests(Path(world.dataset.url))
    touched = {n for n in files.keys() ^ after.keys() if held not in n and not n.startswith("tombstones/")}
    assert {n.split("/")[-1].split("-")[0] for n in touched} == {"manifest"}  # the old and the new one
    assert all(after[n] == files[n] for n in files.keys() & after.keys() if n != "views/v.json")
    again = world.forget(gone)
    assert again.removed == {} and digests(Path(world.dataset.url)) == after


@settings(max_examples=8, deadline=None)
@given(st.sets(st.sampled_from(URLS)))
def test_what_stays_is_what_a_build_without_the_others_makes(
    tmp_path_factory: pytest.TempPathFactory, template: Path, gone: set[str]
) -> None:
    """Also that the build after it computes no row but those of duplicates whose original went."""
    root = tmp_path_factory.mktemp("property")
    shutil.copytree(template, root / "world")
    world, whole = World(root / "world"), World(root / "whole")
    before = packed(world.dataset)
    done = world.forget(*gone)
    assert done.check and done.check.left == ()
    stays = [url for url in URLS if url not in gone]
    assert packed(world.dataset) == {key: m for key, m in before.items() if key in set(map(sample_key, stays))}
    if not stays:
        return
    assert world.build(URLS).is_empty
    whole.build(stays)
    assert packed(world.dataset) == packed(whole.dataset)
    freed = packed(whole.dataset).keys() - before.keys()
    assert world.computed() == ({"talker": len(freed)} if freed else {})


def test_tables_are_what_a_build_of_the_other_rows_writes(world: World) -> None:
    """Byte for byte, tars too: so the next build's tables have the content ids that the rewritten ones have."""
    world.forget("https://a.example/4", "https://gone.example/99")
    folders = [stage.folder for stage in world.stages if not stage.ordered]
    there = {
        f: {n.split(".", 2)[2]: d for n, d in digests(Path(world.dataset.path(f))).items() if "manifest" not in n}
        for f in folders
    }
    world.build(URLS)
    for folder in folders:
        now = digests(Path(world.dataset.path(folder)))
        assert {n.split(".", 2)[2]: d for n, d in now.items() if "manifest" not in n} == there[folder], folder


def test_a_domain_stands_for_its_subdomains_only(world: World) -> None:
    done = world.forget(domains=frozenset({"a.example"}))
    gone = {u for u in URLS if "//a.example" in u or "pics" in u}
    assert done.found.by_domain == set(map(sample_key, gone)) and done.check and not done.check.left
    assert not any(u in words(Path(world.dataset.url)) for u in gone)
    left = {sample_key(u) for u in URLS} - done.found.by_domain
    keys = [
        k
        for p in list_partitions(world.dataset)
        for k in pq.read_table(world.dataset.path(p.parquet))["key"].to_pylist()
    ]
    assert set(keys) == left


@pytest.mark.parametrize(
    ("url", "refused"),
    [
        ("https://a.example", True),
        ("HTTP://me:word@B.A.Example.:80?x=1", True),
        ("//a.example#there", True),
        (" https://a.exa\tmple/x", True),  # as clients read it
        ("https://nota.example/", False),
        ("https://a.example.org/", False),
        ("https://b.example/https://a.example/", False),
        ("https://b.example?u=//a.example", False),
        ("mailto:me@a.example", False),
        ("https://[a.example/", False),
        ("a.example", False),
    ],
)
def test_the_domain_is_the_hosts(url: str, refused: bool) -> None:
    assert Tombstones(domains=frozenset({"a.example"})).refuses_url(url) is refused


@pytest.mark.parametrize(
    "domain", ["bücher.example", "xn--bcher-kva.example", "BU\u0308CHER.example.", "bücher。example"]
)
@pytest.mark.parametrize(
    "host",
    [
        "bücher.example",
        "BÜCHER.Example",
        "bu\u0308cher.example",
        "bücher。example",
        "bücher．example｡",
        "ｂücher.ｅxample",
        "xn--bcher-kva.example",
        "XN--BCHER-KVA.example.",
        "pics.bücher.example",
    ],
)
def test_a_domain_is_refused_in_every_spelling_that_leads_there(domain: str, host: str) -> None:
    asked = Tombstones(domains=frozenset({domain}))
    assert asked.refuses_url(f"http://{host}/a") and asked.refuses_url(f"http://me@{host}:80")
    assert not asked.refuses_url(f"http://{host}.org/a")


def test_a_host_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, read = Tombstones(domains=frozenset({"a.example"})), list[str]()

    def noted(url: str) -> Any:
        read.append(url)
        return urlsplit(url)

    monkeypatch.setattr(tombstones, "urlsplit", noted)
    assert not any(asked.refuses_url(f"http://read-once.example/{n}") for n in range(9))
    assert read == ["http://read-once.example"]


def test_a_damaged_tombstone_file_is_not_to_be_deleted(tmp_path: Path) -> None:
    dataset = Folder(url=str(tmp_path))
    dataset.write("tombstones/0.parquet", b"PAR1 no more")
    with pytest.raises(ValueError, match=r"0.parquet is damaged: restore it from a backup: without it, what was taken"):
        read_tombstones(dataset)


def test_a_tombstone_of_an_unknown_kind_is_of_a_newer_version(tmp_path: Path) -> None:
    dataset = Folder(url=str(tmp_path))
    dataset.write("tombstones/0.parquet", parquet_bytes(pa.table({"kind": ["phash"], "value": ["0"]})))
    with pytest.raises(ValueError, match=r"0.parquet was made by a newer version, .*\(phash\)"):
        read_tombstones(dataset)


def test_causes_are_kept_and_older_files_have_none(tmp_path: Path) -> None:
    dataset = Folder(url=str(tmp_path))
    old = pa.table({"kind": ["key", "domain"], "value": ["0", "a.example"]})
    dataset.write("tombstones/0.parquet", parquet_bytes(old))
    write_tombstones(dataset, keys=["1", "2"], causes={"1": "sha256"})
    write_tombstones(dataset, keys=["2"], causes={"2": "domain"})
    found = read_tombstones(dataset)
    assert found.causes == {"0": "key", "1": "sha256", "2": "key"} and found.domains == {"a.example"}


def test_a_takedown_says_what_each_sample_went_for(world: World) -> None:
    world.forget("https://a.example/4", domains=frozenset({"b.example"}), sha256=frozenset({sha256_of(5)}))
    causes = read_tombstones(world.dataset).causes
    assert causes[sample_key("https://a.example/4")] == "key"
    assert causes[sample_key("https://b.example/3")] == "domain"
    assert causes[sample_key("https://a.example/5")] == "sha256"


def test_samples_with_the_same_bytes_are_told_and_stay(world: World) -> None:
    twin = {sample_key("https://b.example/3"): sha256_of(3)}
    asked = Tombstones(keys=frozenset({sample_key("https://a.example/3")}))
    assert take_down(world.dataset, asked, dry_run=True).same_bytes == twin
    assert take_down(world.dataset, asked).same_bytes == twin
    assert world.forget("https://a.example/4", "https://a.example/6", "https://b.example/6").same_bytes == {}
    assert world.forget(sha256=frozenset({sha256_of(3)})).same_bytes == {}


def test_a_digest_takes_every_sample_with_these_bytes_and_nothing_else(world: World) -> None:
    done = world.forget(sha256=frozenset({sha256_of(3), "0" * 64}))
    twins = {sample_key(f"https://{host}.example/3") for host in "ab"}
    assert done.forgotten == twins and set(done.found.by_sha256.values()) == {sha256_of(3)}
    assert jpeg(3).decode("latin1") not in words(Path(world.dataset.url))
    assert done.removed["partitions"].rows == 2


def test_what_was_taken_down_stays_out_of_later_lists(world: World) -> None:
    world.forget("https://a.example/4", domains=frozenset({"b.example"}), sha256=frozenset({sha256_of(1)}))
    fresh = ["https://new.example/30", "https://x.b.example/31", "https://new.example/1"]
    world.build([*fresh, *URLS])
    told = words(Path(world.dataset.url))
    assert "https://new.example/30" in told and sample_key("https://new.example/30") in packed(world.dataset)
    assert not any(u in told for u in ("https://a.example/4", "https://x.b.example/31", "https://b.example/0"))
    assert jpeg(1).decode("latin1") not in told  # another URL with the same bytes
    assert "taken_down" in told


def test_folders_of_other_settings_are_purged_too(world: World) -> None:
    other = World(world.root, suffix="!")
    other.build(URLS)
    done = world.forget("https://a.example/4")
    for stage in (*world.stages, *other.stages):
        if not stage.ordered:
            assert done.removed[stage.folder].rows == (2 if stage.name == "pack_v" else 1)  # both were packed there
    assert sample_key("https://a.example/4") not in words(Path(world.dataset.url))


def test_a_partition_that_loses_all_its_rows_stays_as_an_empty_file(world: World) -> None:
    first = list_partitions(world.dataset)[0]
    world.forget(*URLS[:5])
    now = list_partitions(world.dataset)[0]
    assert now.name == first.name and now.rows == 0
    plan = world.build(URLS)
    assert plan.is_empty and not packed(world.dataset).keys() & set(map(sample_key, URLS[:5]))
    assert first.number not in [p.number for p in list_partitions(world.dataset)[1:]]


def test_records_keep_what_is_known_of_the_others(world: World) -> None:
    folder = world.stages[0].folder

    def tried() -> dict[str, tuple[int, Any]]:
        tables = [t for found in list_tables(world.dataset, folder, with_tar=True).values() for t in found]
        rows = [row for t in tables for row in read_record(world.dataset, t).to_pylist()]
        return {row["key"]: (row["attempts"], row["tried_at"]) for row in rows}

    before = tried()
    world.forget(URLS[2], URLS[7])
    assert tried() == {k: v for k, v in before.items() if k not in map(sample_key, (URLS[2], URLS[7]))}


def test_manifests_of_older_versions_go_where_they_speak_of_it(world: World) -> None:
    """And stay where they do not: a training may go on with them."""
    first = View.open(world.dataset, "v").info.manifest
    world.build([*URLS, "https://new.example/30"])
    second = View.open(world.dataset, "v").info.manifest
    world.forget("https://new.example/30")
    assert world.dataset.exists(first) and not world.dataset.exists(second)
    third = View.open(world.dataset, "v").info.manifest
    world.forget("https://a.example/4")
    assert not world.dataset.exists(first) and not world.dataset.exists(third)


def test_what_dead_processes_left_goes_and_what_is_not_ours_stays(world: World) -> None:
    camera = world.stages[0].folder
    table = next(
        t for (t,) in list_tables(world.dataset, camera, with_tar=True).values() if t.partition.startswith("000000")
    )
    lone = replace(table, content_id="f" * 16, tar_id="f" * 16)
    for name in (lone.tar, f"{camera}/records/{lone.parquet.split('/')[1]}", f"{camera}/.aside-{'0' * 32}"):
        world.dataset.write(name, jpeg(0))
    mine = ("mine/000000.tar", f"{camera}/notes.tar", "mine-0123456789ab/holiday.tar")
    for name in mine:
        world.dataset.write(name, b"mine")
    world.forget(URLS[0])
    assert not any("f" * 16 in name or "aside" in name for name in digests(Path(world.dataset.url)))
    assert all(world.dataset.exists(name) for name in mine)


def test_a_table_that_lost_its_tar_goes_whole(world: World) -> None:
    tables = list_tables(world.dataset, world.stages[0].folder, with_tar=True)
    table = next(t for (t,) in tables.values() if t.partition.startswith("000000"))
    world.dataset.remove(table.tar)
    check = world.forget(URLS[0]).check
    assert check and check.left == ()
    assert not world.dataset.exists(table.parquet)
    assert world.build(URLS).is_empty and world.computed()["camera"] == 4


@pytest.mark.parametrize("cut", [700, 1024])
def test_a_cut_tar_is_told_in_one_line(world: World, cut: int) -> None:
    """In the midst of a member, and between two."""
    tables = list_tables(world.dataset, world.stages[0].folder, with_tar=True)
    table = next(t for (t,) in tables.values() if t.partition.startswith("000000"))
    world.dataset.write(table.tar, world.dataset.read(table.tar)[: cut + 1024])
    with pytest.raises(ValueError, match=r"\.tar is damaged .*: delete it, then run this"):
        world.forget(URLS[0])
    world.dataset.remove(table.tar)
    world.dataset.remove(table.parquet)
    assert take_down(world.dataset, Tombstones()).check.left == ()


def test_a_dry_run_tells_the_same_and_writes_nothing(world: World) -> None:
    before = digests(Path(world.dataset.url))
    asked = Tombstones(keys=frozenset({sample_key(URLS[0])}), sha256=frozenset({sha256_of(3)}))
    told = take_down(world.dataset, asked, dry_run=True)
    assert digests(Path(world.dataset.url)) == before and told.check is None
    assert take_down(world.dataset, asked).removed == told.removed


@pytest.mark.parametrize(
    ("work", "place"),
    [("rewrite_partition", "partitions/"), ("rewrite_table", "camera-"), ("rewrite_views", "views/v-")],
)
def test_the_last_look_sees_what_is_left(world: World, monkeypatch: pytest.MonkeyPatch, work: str, place: str) -> None:
    """A purge that forgot one kind of file would be told."""
    monkeypatch.setattr(takedown, work, lambda *_, **__: Rewritten(removed=Removed()))
    check = world.forget(URLS[0]).check
    assert check and any(left.startswith(place) for left in check.left)


def test_a_dataset_elsewhere_says_the_same(tmp_path: Path) -> None:
    """On another file system than the disk."""
    here, there = World(tmp_path), World(tmp_path, url=f"memory://{uuid.uuid4().hex}/data")
    asked = {"domains": frozenset({"b.example"}), "sha256": frozenset({sha256_of(5)})}
    results = []
    for world in (here, there):
        world.build(URLS)
        results.append((world.forget(URLS[0], **asked), packed(world.dataset), View.open(world.dataset, "v").info))
    assert results[0] == results[1]
    for stage in here.stages:
        assert here.dataset.list(stage.folder) == there.dataset.list(stage.folder)


FEW = [f"https://a.example/{n}" for n in (1, 2, 1, 3)] + ["https://b.example/1"]
ASKED = Tombstones(domains=frozenset({"b.example"}), sha256=frozenset({sha256_of(2)}))


def die_at(dataset: Folder, step: int) -> None:
    """Takes down, and is killed before its publishing or removing number `step`."""
    publish, remove, count = Folder._publish, Folder.remove, itertools.count()

    def counted(work: Any) -> Any:
        def step_or_die(*given: Any) -> None:
            if next(count) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            work(*given)

        return step_or_die

    Folder._publish, Folder.remove = counted(publish), counted(remove)  # type: ignore[method-assign] - in its own process
    take_down(dataset, ASKED)
    os._exit(0)  # it was not killed: there are no more steps


@pytest.mark.timeout(240)
def test_killed_anywhere_it_goes_on_to_the_same_end(tmp_path: Path) -> None:
    World(tmp_path / "template").build(FEW, size=2)
    shutil.copytree(tmp_path / "template", tmp_path / "whole")
    before = packed(World(tmp_path / "whole").dataset)
    take_down(World(tmp_path / "whole").dataset, ASKED)
    end, left = digests(tmp_path / "whole" / "data"), packed(World(tmp_path / "whole").dataset)
    assert len(left) == len(before) - 1
    for step in itertools.count():
        root = tmp_path / f"killed-{step}"
        shutil.copytree(tmp_path / "template", root)
        dataset = World(root).dataset
        process = multiprocessing.get_context("fork").Process(target=die_at, args=(dataset, step))
        process.start()
        process.join(60)
        assert process.exitcode in (0, -signal.SIGKILL)
        assert packed(dataset) in (before, left)  # a view can be read at any time
        done = take_down(dataset, ASKED)
        assert done.check and done.check.left == ()
        assert digests(root / "data") == end, step
        shutil.rmtree(root)
        if process.exitcode == 0:
            break
    assert step > 25
