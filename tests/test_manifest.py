"""The manifest: the same bytes in whatever pieces it is written, any column of it without the others."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import manifest as module
from pipeline.manifest import Manifest, writing_manifest
from pipeline.shards import View, ViewInfo
from pipeline.storage import Folder

COUNT = 1000


def rows(start: int, end: int) -> pa.Table:
    numbers = range(start, end)
    return pa.table(
        {
            "key": pa.array([f"{n:024x}" for n in numbers], pa.string()),
            "shard": pa.array([f"views/v/{n // 100}.tar" for n in numbers], pa.string()),
            "bucket": pa.array([None if n % 3 else "16x16" for n in numbers], pa.string()),
            "image_offset": pa.array(numbers, pa.int64()),
            "latents_shard": pa.array([f"latents/{n // 200}.tar" if n % 2 else None for n in numbers], pa.string()),
        }
    )


def write(dataset: Folder, name: str, cuts: list[int]) -> str:
    with writing_manifest(dataset, "views") as writer:
        for start, end in zip([0, *cuts], [*cuts, COUNT]):
            writer.add(rows(start, end))
        writer.close()
        assert writer.rows == COUNT
        writer.publish(name)
        return writer.sha256


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROW_GROUP", 64)


@pytest.mark.usefixtures("small_groups")
def test_pieces_do_not_show(tmp_path: Path) -> None:
    dataset = Folder(url=str(tmp_path))
    digests = {write(dataset, f"views/{n}.parquet", cuts) for n, cuts in enumerate(([], [1, 2, 64, 700], [500, 500]))}
    assert len(digests) == 1
    file = pq.ParquetFile(tmp_path / "views" / "1.parquet")
    assert {file.metadata.row_group(n).num_rows for n in range(file.num_row_groups - 1)} == {64}
    assert file.read() == rows(0, COUNT)
    assert sorted(p.name for p in (tmp_path / "views").iterdir()) == ["0.parquet", "1.parquet", "2.parquet"]


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("url", ["{folder}", "memory://manifests"])
def test_a_column_is_read_without_the_others(tmp_path: Path, url: str) -> None:
    dataset = Folder(url=url.format(folder=tmp_path))
    sha256 = write(dataset, "views/m.parquet", [500])
    for manifest in (Manifest(dataset, "views/m.parquet", sha256), Manifest(dataset, "views/m.parquet")):
        everything = rows(0, COUNT)
        assert len(manifest) == COUNT and manifest.schema == everything.schema
        assert manifest.column_names == everything.column_names
        assert manifest.column("image_offset")[77].as_py() == 77
        assert pa.types.is_dictionary(manifest.column("shard").type)  # four bytes a row
        assert manifest.select(["shard", "bucket"]).to_pylist() == everything.select(["shard", "bucket"]).to_pylist()
        assert set(manifest._columns) == {"image_offset", "shard", "bucket"}
        assert pa.concat_tables(manifest.batches()) == everything
        assert manifest.shards == {*(f"views/v/{n}.tar" for n in range(10)), *(f"latents/{n}.tar" for n in range(5))}
        with pytest.raises(KeyError):
            manifest.column("nothing")


def test_threads_share_it_and_processes_get_their_own(tmp_path: Path) -> None:
    dataset = Folder(url=str(tmp_path))
    info = ViewInfo(
        view="v", version="1", resolution=1, samples=COUNT, manifest="views/m.parquet", tokenizers={},
        manifest_sha256=write(dataset, "views/m.parquet", []),
    )  # fmt: skip
    view = View(dataset, info)
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda n: id(view.manifest.column(("key", "shard", "bucket")[n % 3])), range(60)))
    assert len(found) == 3
    assert len(pickle.dumps(view)) < 5000
    assert pickle.loads(pickle.dumps(view)).manifest.column("key") == view.manifest.column("key")


def test_an_empty_one_and_a_damaged_one(tmp_path: Path) -> None:
    dataset = Folder(url=str(tmp_path))
    with writing_manifest(dataset, "views") as writer:
        writer.add(rows(0, 0))
        writer.close()
        writer.publish("views/m.parquet")
    empty = Manifest(dataset, "views/m.parquet", writer.sha256)
    assert len(empty) == 0 and empty.shards == set() and empty.column("key").to_pylist() == []
    dataset.write("views/m.parquet", b"PAR1")
    for sha256, why in ((writer.sha256, "its digest is not the view's"), ("", "is damaged")):
        with pytest.raises(ValueError, match=why):
            len(Manifest(dataset, "views/m.parquet", sha256))
