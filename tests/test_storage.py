"""The dataset folder, on a local disk and on another file system: what is there is whole, what is not published is not."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import time
import uuid
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.storage import Folder, read_json
from tests.unreliable_files import UnreliableFiles


@pytest.fixture(params=["local", "file", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    root = {"local": str(tmp_path), "file": f"file://{tmp_path}", "memory": f"memory://{uuid.uuid4().hex}"}[
        request.param
    ]
    return Folder(url=root + "/dataset")


def test_write_then_read(folder: Folder) -> None:
    assert folder.list("views") == [] and not folder.exists("views/a.json")
    folder.write("views/b.json", b"two")
    folder.write("views/a.json", b"0123456789")
    folder.write("views/a/shard.tar", b"deeper")
    folder.write("top.txt", b"here")
    assert folder.list("views") == ["a.json", "b.json"] and folder.list("") == ["top.txt"]
    assert folder.exists("views/a/shard.tar") and folder.read("views/b.json") == b"two"
    assert folder.read_range("views/a.json", 3, 4) == b"3456"
    folder.write("views/b.json", b"new")
    assert folder.read("views/b.json") == b"new"


def test_entries_show_what_is_not_published(folder: Folder) -> None:
    """And how much of it and since when, which is what tells a killed build's leftovers from a running one's."""
    before = time.time()
    assert folder.entries("stage") == []
    folder.write("stage/b.tar", b"four")
    folder.write("stage/.aside-1", b"")
    folder.write("stage/deeper/c.tar", b"c")
    found = folder.entries("stage")
    assert [(e.name, e.size) for e in found] == [(".aside-1", 0), ("b.tar", 4)]
    assert all(before - 2 < e.modified < time.time() + 2 for e in found)


def test_removing_twice_is_no_error(folder: Folder) -> None:
    folder.write("a.json", b"")
    folder.remove("a.json")
    folder.remove("a.json")
    assert not folder.exists("a.json")


def test_what_is_not_there_is_a_file_not_found(folder: Folder) -> None:
    with pytest.raises(FileNotFoundError):
        folder.read("none.json")


def test_it_travels(folder: Folder) -> None:
    folder.write("a.json", b"1")
    assert pickle.loads(pickle.dumps(folder)).read("a.json") == b"1"


def test_without_publishing_nothing_appears(folder: Folder) -> None:
    with pytest.raises(RuntimeError), folder.writing("stage") as aside:
        aside.path.write_bytes(b"half")
        assert folder.list("stage") == []
        raise RuntimeError("on the way")
    assert folder.list("stage") == [] and not aside.path.exists()


def test_a_local_file_appears_by_one_rename_in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rename is atomic within a file system only, and lasts only once both file and folder are synced."""
    folder, seen = Folder(url=str(tmp_path)), []
    replace, sync = os.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (seen.append("sync"), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append((Path(a).parent, Path(b).name)), replace(a, b)))
    folder.write("stage/table.parquet", b"whole")
    assert seen == ["sync", (tmp_path / "stage", "table.parquet"), "sync"]
    assert folder.list("stage") == ["table.parquet"]


def _write_until_killed(folder: Folder) -> None:
    for count in range(10**9):
        folder.write("stage/table", bytes([count % 256]) * 300_000)


def test_killed_at_any_moment_the_file_is_whole(tmp_path: Path) -> None:
    folder = Folder(url=str(tmp_path))
    for wait in (0.05, 0.11, 0.17):
        process = multiprocessing.get_context("fork").Process(target=_write_until_killed, args=(folder,))
        process.start()
        end = time.monotonic() + 30
        while not folder.exists("stage/table") and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(wait)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join(10)
        assert folder.list("stage") == ["table"]
        data = folder.read("stage/table")
        assert len(data) == 300_000 and len(set(data)) == 1


@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=2000), st.integers(0, 2000), st.integers(0, 2000))
def test_ranges_are_slices(tmp_path_factory: pytest.TempPathFactory, data: bytes, offset: int, size: int) -> None:
    folder = Folder(url=str(tmp_path_factory.mktemp("storage")))
    folder.write("shard.tar", data)
    offset = min(offset, len(data))
    assert folder.read_range("shard.tar", offset, size) == data[offset : offset + size]


def test_ranges_come_in_the_order_asked(folder: Folder) -> None:
    folder.write("a.tar", b"0123456789")
    assert list(folder.read_ranges("a.tar", [(7, 2), (0, 0), (0, 3), (3, 4)])) == [b"78", b"", b"012", b"3456"]
    assert list(folder.read_ranges("a.tar", [])) == []
    with folder.open("a.tar") as file:
        file.seek(4)
        assert file.read(2) == b"45"


def test_a_host_in_the_url_is_the_file_systems_matter() -> None:
    assert Folder(url="http://example.org/data").path("a.json") == "http://example.org/data/a.json"


class Strict(MemoryFileSystem):
    """Keeps its listings, and takes no argument that it does not know, as `sftp` does."""

    protocol = "strict"

    def __init__(self) -> None:
        super().__init__()

    def ls(self, path: str, detail: bool = True, **_: object) -> list[dict[str, object]]:
        if path not in self.dircache:
            self.dircache[path] = found = super().ls(path, detail=True)
            return found
        return self.dircache[path]


def test_a_listing_is_always_fresh() -> None:
    """Another builder, on another machine, may have published since."""
    fsspec.register_implementation("strict", Strict, clobber=True)
    folder = Folder(url=f"strict://{uuid.uuid4().hex}")
    for count in range(3):
        assert len(folder.list("stage")) == len(folder.entries("stage")) == count
        MemoryFileSystem().pipe_file(f"{folder.path('stage')}/{count}.tar", b"")
    assert folder.folders("") == ["stage"]


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"null", b"\xff", b"{}", b'{"manifest": 1}'])
def test_damaged_json_is_told_in_one_line(folder: Folder, data: bytes) -> None:
    folder.write("views/v.json", data)
    with pytest.raises(ValueError, match=r"views/v\.json is damaged: [^\n]+$"):
        read_json(folder, "views/v.json", manifest=str)


def test_errors_elsewhere_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system may raise anything of its own, such as botocore's NoCredentialsError."""

    class NoCredentials(Exception):
        pass

    def refuse(*_: object, **__: object) -> bytes:
        raise NoCredentials("Unable to locate credentials")

    folder = Folder(url="memory://bucket/data")
    monkeypatch.setattr(type(folder._files), "cat_file", refuse)
    with pytest.raises(OSError, match="memory://bucket/data: NoCredentials: Unable to locate credentials"):
        folder.read("a.json")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(url: str, **_: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.url_to_fs", missing)
    with pytest.raises(ValueError, match="s3://bucket/data: a package is missing for such folders: Install s3fs"):
        Folder(url="s3://bucket/data").list("")


@pytest.fixture
def unreliable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    """One call of three fails."""
    monkeypatch.setattr("pipeline.patience.sleep", lambda _: None)
    return Folder(url=f"unreliable://0.33-1{tmp_path}/dataset")


def test_a_storage_that_fails_is_asked_until_it_does_not(unreliable: Folder, tmp_path: Path) -> None:
    """Nothing is lost, nothing half written is shown, and no failure is taken for a no."""
    names = [f"stage/{number:02d}.tar" for number in range(6)]
    for name in names:
        unreliable.write(name, name.encode() * 100)
        assert unreliable.exists(name) and not unreliable.exists(name + ".none")
        assert unreliable.read(name) == name.encode() * 100
        places = [(offset, 4) for offset in range(0, 80, 4)]
        assert b"".join(unreliable.read_ranges(name, places)) == (name.encode() * 100)[:80]
        with unreliable.open(name) as file:
            assert file.seek(-6, 2) == unreliable.size(name) - 6 and file.read() == name.encode()[-6:]
        assert unreliable.fetch(name, tmp_path / "copy") == (tmp_path / "copy").stat().st_size
    assert unreliable.list("stage") == [name.removeprefix("stage/") for name in names]
    published = [entry for entry in unreliable.entries("stage") if not entry.name.startswith(".")]
    assert [entry.size for entry in published] == [1200] * 6
    for name in names:
        unreliable.remove(name)
    assert unreliable.list("stage") == []
    assert isinstance(unreliable._files, UnreliableFiles) and unreliable._files.failed > 20


def test_half_a_file_is_never_seen_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As who writes over SFTP may be killed on the way."""
    monkeypatch.setattr("pipeline.patience.PATIENCE", 0.0)
    folder = Folder(url=f"unreliable://1.0-0{tmp_path}")
    with pytest.raises(OSError, match=r"unreliable://1\.0-0.* has failed for 0 s"):
        folder.write("stage/a.tar", b"whole")
    assert [(path.name.startswith(".aside-"), path.read_bytes()) for path in tmp_path.rglob("stage/*")] == [
        (True, b"wh")
    ]
