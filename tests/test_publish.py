"""Naming a view's version: with the members that later stages add to its samples, through changes, takedown and gc."""

from __future__ import annotations

import io
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.garbage import delete_garbage, find_garbage, survey
from pipeline.manifest import Manifest
from pipeline.partitions import list_partitions
from pipeline.plan import make_plan
from pipeline.sample import sample_key
from pipeline.settings import write_settings
from pipeline.shards import View
from pipeline.stage import Columns, Stage
from pipeline.storage import Folder
from pipeline.takedown import take_down
from pipeline.tombstones import Tombstones
from pipeline.verification import verify_view
from stages.pack import Pack, PackConfig
from tests.packing import Facts, pack_urls, tokenizer
from tests.small_stages import SmallConfig

URLS = [f"u://{n}" for n in range(20, 32)]


@dataclass(frozen=True, kw_only=True)
class MeansConfig:
    """Of which view."""

    view: str
    power: int = 1
    with_crc32: bool = True


class Means(Stage):
    """packed_image_<view> → the mean of its bytes, as latents are added. Samples of even key have none."""

    drops = False
    config: MeansConfig

    def __init__(self, config: MeansConfig) -> None:
        super().__init__(config)
        self.name, self.companion_of = f"means_{config.view}", config.view
        self.reads = (f"packed_image_{config.view}",)
        self.payload = {f"means_{config.view}": "means.npy"}
        self.writes = pa.schema([(f"means_{config.view}_crc32", pa.uint32())] if config.with_crc32 else [])

    @property
    def view_facts(self) -> dict[str, Any]:
        return {"means": {"power": self.config.power}}

    def process(self, batch: pa.Table) -> Columns:
        keys, images = (batch.column(name).to_pylist() for name in ("key", *self.reads))
        members = [mean_of(image, self.config.power) if int(key, 16) % 2 else None for key, image in zip(keys, images)]
        crc32 = [None if member is None else zlib.crc32(member) for member in members]
        return {f"means_{self.config.view}": members} | dict.fromkeys(self.writes.names, crc32)


def mean_of(image: bytes, power: int) -> bytes:
    out = io.BytesIO()
    np.save(out, np.float32(np.frombuffer(image, np.uint8).mean() ** power))
    return out.getvalue()


def stages_of(folder: Path, *means: MeansConfig, where: str = "true") -> list[Stage]:
    """Two views that take the same, the second with means."""
    config = PackConfig(view="v", resolution=16, shape="keep", tokenizers=(tokenizer(folder),), where=where)
    other = PackConfig(view="other", resolution=16, shape="square", tokenizers=())
    return [Facts(SmallConfig()), Pack(other), Pack(config), *map(Means, means)]


@pytest.fixture
def dataset(tmp_path: Path) -> Folder:
    return Folder(url=str(tmp_path / "dataset"))


def packed(dataset: Folder) -> dict[str, tuple[bytes, bytes | None]]:
    """Each sample's picture and mean, by key; and that the view is whole."""
    assert verify_view(dataset, "v").problems == () and verify_view(dataset, "other").problems == ()
    view = View.open(dataset, "v")
    found = {}
    for row, key in enumerate(view.manifest.column("key").to_pylist()):
        mean = view.read(row, "means") if view.place(row, "means") else None
        found[key] = view.read(row, "image"), mean
    return found


@pytest.mark.parametrize("with_crc32", [True, False])
def test_a_companions_members_are_in_the_manifest(tmp_path: Path, dataset: Folder, with_crc32: bool) -> None:
    means = MeansConfig(view="v", power=2, with_crc32=with_crc32)
    info = pack_urls(tmp_path, dataset, stages_of(tmp_path, means), URLS)[1]
    assert info.companions == {"means": {"power": 2}} and info.members["means"] == "means.npy"
    assert list(info.made_by) == ["facts", "pack_v", "means_v"] and info.made_by["means_v"]["settings"]["power"] == 2
    view = View.open(dataset, "v")
    for row, (key, (image, mean)) in enumerate(packed(dataset).items()):
        assert mean == (mean_of(image, 2) if int(key, 16) % 2 else None)
        place = view.place(row, "means")
        assert place is None or place[0].startswith("means_v-")
    assert (Manifest(dataset, info.manifest).column("means_crc32").null_count < len(URLS)) is with_crc32
    shard = Path(dataset.path(next(name for name in view.manifest.shards if name.startswith("means_v-"))))
    shard.write_bytes(shard.read_bytes().replace(b"NUMPY", b"NUMPi", 1))
    assert {p.shard.split("-")[0] for p in verify_view(dataset, "v").problems} == {"means_v"}


def test_another_companion_makes_another_version_over_the_same_shards(tmp_path: Path, dataset: Folder) -> None:
    infos = [
        pack_urls(tmp_path, dataset, stages_of(tmp_path, *means), URLS)[1]
        for means in ([], [MeansConfig(view="v")], [MeansConfig(view="v", power=3)], [])
    ]
    assert infos[0] == infos[3] and len({info.version for info in infos}) == 3
    assert len({tuple(sorted(Manifest(dataset, i.manifest).column("shard").to_pylist())) for i in infos}) == 1
    assert View.open(dataset, "v").info.companions == {}


def test_a_pointer_that_says_another_thing_is_written_anew(tmp_path: Path, dataset: Folder) -> None:
    stages = stages_of(tmp_path)
    info = pack_urls(tmp_path, dataset, stages, URLS)[1]
    manifest = Path(dataset.path(info.manifest))
    before = manifest.stat().st_mtime_ns
    dataset.write("views/v.json", json.dumps({**json.loads(dataset.read("views/v.json")), "made_by": {}}).encode())
    assert pack_urls(tmp_path, dataset, stages, URLS)[1] == info == View.open(dataset, "v").info
    assert manifest.stat().st_mtime_ns == before


@pytest.mark.parametrize("with_crc32", [True, False])
def test_a_takedown_follows_both(tmp_path: Path, dataset: Folder, with_crc32: bool) -> None:
    stages = stages_of(tmp_path, MeansConfig(view="v", with_crc32=with_crc32))
    pack_urls(tmp_path, dataset, stages, URLS)
    before = packed(dataset)
    gone = next(key for key, (_, mean) in before.items() if mean)
    take_down(dataset, Tombstones(keys=frozenset([gone])))
    assert packed(dataset) == {key: parts for key, parts in before.items() if key != gone}
    info = View.open(dataset, "v").info
    pack_urls(tmp_path, dataset, stages, URLS)
    assert packed(dataset) == {key: parts for key, parts in before.items() if key != gone}
    assert View.open(dataset, "v").info.samples == info.samples == len(URLS) - 1


def test_gc_keeps_the_tars_that_a_view_names(tmp_path: Path, dataset: Folder) -> None:
    stages = stages_of(tmp_path, MeansConfig(view="v"))
    pack_urls(tmp_path, dataset, stages, URLS)
    write_settings(dataset, stages)
    named = View.open(dataset, "v").manifest.shards
    assert {name.split("/")[0].split("-")[0] for name in named} == {"views", "means_v"}
    garbage = find_garbage(dataset, survey(dataset), [], views={"v"}, manifests=(), min_age=0.0)
    going = {name for item in garbage for name in item.files}
    assert not named & going
    assert any(name.startswith("views/other-") for name in going)


# -- shards that stay ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MarksConfig:
    """Which URLs are marked."""

    marked: tuple[str, ...] = ()


class Marks(Stage):
    """url → a mark, which the condition may ask for."""

    name = "marks"
    reads = ("url",)
    writes = pa.schema([("mark", pa.string())])
    drops = False
    config: MarksConfig

    def process(self, batch: pa.Table) -> Columns:
        return {"mark": ["x" if url in self.config.marked else "" for url in batch.column("url").to_pylist()]}


def marking(folder: Path, *marked: str) -> list[Stage]:
    """A view of the larger half of the pictures, whose json tells the mark."""
    config = PackConfig(view="v", resolution=16, tokenizers=(), where="width >= 26", facts=("mark",))
    return [Facts(SmallConfig()), Marks(MarksConfig(marked=marked)), Pack(config)]


def shard_times(dataset: Folder) -> dict[str, int]:
    """The view's tars and when each was written."""
    return {p.name: p.stat().st_mtime_ns for p in Path(dataset.path("views")).rglob("*.tar")}


def test_a_change_rewrites_the_shards_that_hold_it_and_no_other(tmp_path: Path, dataset: Folder) -> None:
    """Pictures 20 to 25 are not in the view: partitions of five hold 20-24, 25-29, 30-31."""
    pack_urls(tmp_path, dataset, marking(tmp_path), URLS)
    before, manifest = shard_times(dataset), View.open(dataset, "v").info.manifest_sha256
    assert len(before) == 3
    pack_urls(tmp_path, dataset, marking(tmp_path, *URLS[:6]), URLS)
    assert shard_times(dataset) == before  # though all tables of two partitions are new
    assert View.open(dataset, "v").info.manifest_sha256 == manifest
    pack_urls(tmp_path, dataset, marking(tmp_path, *URLS[:7]), URLS)
    after = shard_times(dataset)
    assert len(after) == 4 and after.items() >= before.items()
    held = {name: shard for name, shard in zip(URLS[6:], View.open(dataset, "v").manifest.column("shard").to_pylist())}
    new = View.open(dataset, "v").manifest.shards - {f"views/{p}" for p in before}
    assert len(held) == 6 and {s.rsplit("/", 1)[1] for s in new} - before.keys() == after.keys() - before.keys()
    assert verify_view(dataset, "v").problems == ()


def test_a_takedown_leaves_a_tar_that_holds_nothing_of_it(tmp_path: Path, dataset: Folder) -> None:
    stages = marking(tmp_path)
    pack_urls(tmp_path, dataset, stages, URLS)
    pack_urls(tmp_path, dataset, marking(tmp_path, *URLS[:6]), URLS)  # two tables with one tar
    before = shard_times(dataset)
    take_down(dataset, Tombstones(keys=frozenset([sample_key("u://25")])))  # which is in no view
    assert set(shard_times(dataset)) == set(before)
    assert verify_view(dataset, "v").problems == () and len(View.open(dataset, "v")) == 6
    take_down(dataset, Tombstones(keys=frozenset([sample_key("u://26")])))  # which both tables have there
    assert len(set(shard_times(dataset)) & set(before)) == 2
    assert verify_view(dataset, "v").problems == () and len(View.open(dataset, "v")) == 5
    assert sample_key("u://26").encode() not in b"".join(p.read_bytes() for p in Path(dataset.url).rglob("*.tar"))


def test_gc_keeps_a_tar_as_long_as_a_table_has_it(tmp_path: Path, dataset: Folder) -> None:
    pack_urls(tmp_path, dataset, marking(tmp_path, *URLS[:6]), URLS)
    stages = marking(tmp_path)
    pack_urls(tmp_path, dataset, stages, URLS)
    write_settings(dataset, stages)
    before = shard_times(dataset)
    orphan = next(iter(View.open(dataset, "v").manifest.shards)).split(".")[0] + f".{'0' * 16}.tar"
    dataset.write(orphan, b"")
    partitions = list_partitions(dataset)
    plan = make_plan(dataset, stages, partitions)
    garbage = find_garbage(dataset, survey(dataset), [plan], views={"v"}, manifests=(), min_age=0.0)
    views = {name: item.why for item in garbage for name in item.files if name.startswith("views/")}
    assert views[orphan] == "left by a killed build" and [n for n in views if n.endswith(".tar")] == [orphan]
    # Of the elder tables the one whose tar the view does not name; with the other its tar could still be taken down.
    assert sorted(why for name, why in views.items() if name != orphan) == ["old view version", "superseded"]
    delete_garbage(dataset, garbage)
    assert shard_times(dataset) == before and verify_view(dataset, "v").problems == ()
    assert make_plan(dataset, stages, partitions).is_empty
