"""A view is read again to the last byte: whatever is changed in it is found and said."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.manifest import writing_manifest
from pipeline.shards import ShardWriter, View, ViewInfo, member_header, publish_version
from pipeline.storage import Folder
from pipeline.verification import MOST, Verified, verify_view
from stages.pack import Pack, PackConfig
from tests.packing import Facts, pack_urls, tokenizer
from tests.small_stages import SmallConfig

URLS = [f"u://{n}" for n in range(16, 23)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A view of seven samples in two shards, some without a short caption, in buckets."""
    root = tmp_path_factory.mktemp("whole")
    config = PackConfig(view="v", resolution=16, shape="buckets", tokenizers=(tokenizer(root, "long", "short"),))
    dataset = Folder(url=str(root / "dataset"))
    pack_urls(root, dataset, [Facts(SmallConfig()), Pack(config)], URLS)
    return dataset


@pytest.fixture
def copied(whole: Folder, tmp_path: Path) -> tuple[Folder, list[Path]]:
    """The same to be broken, and its shards."""
    shutil.copytree(whole.url, tmp_path / "dataset")
    return Folder(url=str(tmp_path / "dataset")), sorted((tmp_path / "dataset" / "views").rglob("*.tar"))


def whats(found: Verified) -> set[str]:
    return {problem.what for problem in found.problems}


def with_manifest(dataset: Folder, rows: pa.Table, **changed: object) -> None:
    """Names a version of the view with these rows."""
    info = View.open(dataset, "v").info
    with writing_manifest(dataset, "views") as manifest:
        manifest.add(rows)
        manifest.close()
        found = publish_version(dataset, ViewInfo(**{**asdict(info), "manifest": "views/v-other.parquet"}), manifest)
    if changed:
        dataset.write("views/v.json", json.dumps({**asdict(found), **changed}).encode())


def rows_of(dataset: Folder) -> pa.Table:
    return pa.concat_tables(View.open(dataset, "v").manifest.batches())


@pytest.mark.parametrize("decode", [False, True])
def test_a_whole_view_has_no_problem(whole: Folder, decode: bool) -> None:
    found = verify_view(whole, "v", decode=decode)
    shards = list(Path(whole.path("views")).rglob("*.tar"))
    assert (found.samples, found.shards, found.problems, found.untold) == (7, 2, (), 0)
    assert found.bytes == sum(shard.stat().st_size for shard in shards)  # every byte was read


def test_elsewhere_too(whole: Folder, tmp_path: Path) -> None:
    there = Folder(url=f"memory://{tmp_path.name}")
    for path in (p for p in Path(whole.url).rglob("*") if p.is_file() and "views" in str(p)):
        there.write(str(path.relative_to(whole.url)), path.read_bytes())
    here, found = verify_view(whole, "v"), verify_view(there, "v")
    assert replace(found, seconds=0) == replace(here, seconds=0) and not found.problems


def test_any_byte_that_changes_is_found(whole: Folder, tmp_path: Path) -> None:
    """Also where no reader looks: owners, times and checksums of headers, padding, what is behind the end."""
    shutil.copytree(whole.url, tmp_path / "dataset")
    dataset = Folder(url=str(tmp_path / "dataset"))
    shard = sorted((tmp_path / "dataset" / "views").rglob("*.tar"))[0]
    data = shard.read_bytes()

    @settings(max_examples=100, deadline=None)
    @given(spot=st.integers(0, len(data) - 1), flip=st.integers(1, 255))
    def check(spot: int, flip: int) -> None:
        broken = bytearray(data)
        broken[spot] ^= flip
        shard.write_bytes(broken)
        assert verify_view(dataset, "v").problems

    check()


@given(end=st.floats(0, 1, exclude_max=True))
@settings(max_examples=30, deadline=None)
def test_a_shard_that_is_cut_is_found(whole: Folder, end: float) -> None:
    shard = sorted(Path(whole.path("views")).rglob("*.tar"))[0]
    data = shard.read_bytes()
    try:
        shard.write_bytes(data[: int(end * len(data))])
        assert "length" in whats(verify_view(whole, "v"))
    finally:
        shard.write_bytes(data)


def test_what_is_behind_the_end_is_found(copied: tuple[Folder, list[Path]]) -> None:
    dataset, shards = copied
    shards[0].write_bytes(shards[0].read_bytes() + b"\0" * 512)
    assert whats(verify_view(dataset, "v")) == {"length"}


def test_a_shard_that_is_gone_is_named(copied: tuple[Folder, list[Path]]) -> None:
    dataset, shards = copied
    shards[1].unlink()
    (problem,) = verify_view(dataset, "v").problems
    assert problem.what == "missing" and problem.shard.endswith(shards[1].name)


def test_members_that_changed_places_are_found(copied: tuple[Folder, list[Path]]) -> None:
    """Any reader would take such a tar, with one sample's picture beside another's caption."""
    dataset, shards = copied
    with tarfile.open(shards[0]) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
    keys = sorted({name.split(".")[0] for name in members})
    one, other = f"{keys[0]}.jpg", f"{keys[1]}.jpg"
    members[one], members[other] = members[other], members[one]
    writer = ShardWriter(shards[0])
    for key in dict.fromkeys(name.split(".")[0] for name in members):
        writer.write(key, {n.split(".", 1)[1]: d for n, d in members.items() if n.startswith(key)})
    writer.close()
    found = verify_view(dataset, "v")
    assert whats(found) <= {"bytes", "header", "padding", "length"} and {p.key for p in found.problems} >= {
        keys[0],
        keys[1],
    }


def test_a_key_that_is_there_twice_is_found(copied: tuple[Folder, list[Path]]) -> None:
    dataset, _ = copied
    rows = rows_of(dataset)
    with_manifest(dataset, pa.concat_tables([rows, rows.slice(0, 1)]))
    found = verify_view(dataset, "v")
    assert {"key", "order"} <= whats(found)
    assert [p.key for p in found.problems if p.what == "key"] == [rows.column("key")[0].as_py()]


@pytest.mark.parametrize(
    ("column", "what"),
    [
        ("image_crc32", "bytes"), ("image_size", "header"), ("json_offset", "header"), ("width", "image"),
        ("tokens_t5_length", "tokens"), ("key", "header"),
    ],
)  # fmt: skip
def test_a_manifest_that_says_another_thing_is_found(copied: tuple[Folder, list[Path]], column: str, what: str) -> None:
    dataset, _ = copied
    rows = rows_of(dataset)
    place, values = rows.schema.get_field_index(column), rows.column(column).to_pylist()
    values[3] = "0" * 24 if column == "key" else values[3] + 1
    with_manifest(dataset, rows.set_column(place, rows.schema.field(place), pa.array(values, rows.schema.types[place])))
    assert what in whats(verify_view(dataset, "v"))


def test_rows_that_are_missing_are_found(copied: tuple[Folder, list[Path]]) -> None:
    """The shard then holds members of no sample; and the view speaks of more samples than there are."""
    dataset, _ = copied
    with_manifest(dataset, rows_of(dataset).slice(1), samples=7)
    assert {"samples", "header"} <= whats(verify_view(dataset, "v"))


def test_members_that_no_reader_could_use_are_found(tmp_path: Path) -> None:
    """Their bytes are as the manifest says, so it was written that way."""
    dataset = Folder(url=str(tmp_path))
    pickled = io.BytesIO()
    np.save(pickled, np.array([{}], object), allow_pickle=True)
    good = io.BytesIO()
    np.save(good, np.arange(3, dtype=np.uint16))
    members = {"image": "jpg", "json": "json", "tokens_t5": "t5.npy"}
    contents = {
        "a": {"jpg": b"no picture", "json": b"{}", "t5.npy": good.getvalue()},
        "b": {"jpg": b"", "json": b"[]", "t5.npy": pickled.getvalue()},
        "c": {"jpg": b"", "json": b"{", "t5.npy": good.getvalue()[:-2]},
    }
    (tmp_path / "views").mkdir()
    writer = ShardWriter(tmp_path / "views" / "s.tar")
    for key, parts in contents.items():
        writer.write(key, parts)
    places = writer.close()
    rows = [
        {"key": key, "shard": "views/s.tar", "width": 1, "height": 1, "tokens_t5_length": 3}
        | {f"{m}_{part}": v for m, e in members.items() for part, v in zip(("offset", "size"), places[key][e])}
        | {f"{m}_crc32": None for m in members}
        for key in contents
    ]
    info = ViewInfo(
        view="v", version="1", resolution=1, samples=0, manifest="views/m.parquet", tokenizers={}, members=members
    )
    with writing_manifest(dataset, "views") as manifest:
        manifest.add(pa.Table.from_pylist(rows))
        manifest.close()
        publish_version(dataset, info, manifest)
    found = [(p.key, p.what) for p in verify_view(dataset, "v").problems]
    assert found == [
        ("a", "image"), ("b", "image"), ("b", "json"), ("b", "tokens"), ("c", "image"), ("c", "json"), ("c", "tokens")
    ]  # fmt: skip


def test_of_many_problems_the_first_are_told(copied: tuple[Folder, list[Path]]) -> None:
    dataset, shards = copied
    shards[0].write_bytes(bytes(shards[0].stat().st_size))
    found = verify_view(dataset, "v")
    assert len(found.problems) == MOST and found.untold > 0


def test_without_a_manifest_there_is_nothing_to_go_by(copied: tuple[Folder, list[Path]]) -> None:
    dataset, _ = copied
    manifest = Path(dataset.path(View.open(dataset, "v").info.manifest))
    manifest.write_bytes(manifest.read_bytes()[:-1])
    with pytest.raises(ValueError, match="its digest is not the view's"):
        verify_view(dataset, "v")


def test_the_header_is_the_writers(copied: tuple[Folder, list[Path]]) -> None:
    _, shards = copied
    with tarfile.open(shards[0]) as tar:
        data = shards[0].read_bytes()
        for member in tar:
            assert data[member.offset : member.offset_data] == member_header(member.name, member.size)
            assert (member.mtime, member.uid, member.gid, member.uname, member.mode) == (0, 0, 0, "root", 0o444)
