"""Evaluation sets: read from a folder or a file, named by their content, refused in one line where they are none."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from benchmarks.picture_variants import jpeg, natural_picture
from stages.evaluation_set import EvaluationSet, pdq_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures, one of them in a folder within, beside what is none."""
    (tmp_path / "set" / "within").mkdir(parents=True)
    for seed, name in enumerate(("a.jpg", "within/b.JPG")):
        (tmp_path / "set" / name).write_bytes(jpeg(natural_picture(np.random.default_rng(seed), 120, 90)))
    (tmp_path / "set" / "notes.txt").write_text("whence they come")
    return tmp_path / "set"


def test_a_folder_of_pictures(folder: Path) -> None:
    rows = EvaluationSet(path=str(folder)).pictures().to_pylist()
    assert [row["name"] for row in rows] == ["a.jpg", "within/b.JPG"]
    for row in rows:
        data = (folder / row["name"]).read_bytes()
        assert row["sha256"] == hashlib.sha256(data).hexdigest() and len(row["pdq"]) == 32
        assert (row["pdq"], row["pdq_quality"]) == pdq_of(data)


def test_it_is_named_by_content_not_by_place(folder: Path) -> None:
    before = EvaluationSet(path=str(folder)).id
    moved = folder.rename(folder.parent / "moved")
    assert EvaluationSet(path=str(moved)).id == before
    (moved / "notes.txt").write_text("something else")
    assert EvaluationSet(path=str(moved)).id == before
    (moved / "a.jpg").write_bytes(b"other")
    assert EvaluationSet(path=str(moved)).id != before


def test_a_table_of_hashes(tmp_path: Path) -> None:
    path = tmp_path / "known.parquet"
    pq.write_table(pa.table({"url": ["http://x/1"], "pdq": pa.array([b"1" * 32], pa.binary()), "more": [1]}), path)
    found = EvaluationSet(path=str(path)).pictures().to_pylist()
    assert found == [{"name": "http://x/1", "sha256": None, "pdq": b"1" * 32, "pdq_quality": 100}]
    pq.write_table(pa.table({"sha256": ["ab"]}), path)
    assert EvaluationSet(path=str(path)).pictures().to_pylist()[0]["name"] == "0"


def test_embeddings(tmp_path: Path) -> None:
    vectors = np.eye(3, dtype=np.float16)
    np.save(tmp_path / "e.npy", vectors)
    names, found = EvaluationSet(path=str(tmp_path / "e.npy")).embeddings()
    assert names == ["0", "1", "2"] and found.dtype == np.float32 and np.array_equal(found, vectors)
    pq.write_table(
        pa.table({"key": list("uvw"), "image_embedding": list(vectors.astype(np.float32))}), tmp_path / "e.parquet"
    )
    names, found = EvaluationSet(path=str(tmp_path / "e.parquet")).embeddings()
    assert names == ["u", "v", "w"] and np.array_equal(found, vectors)


def test_what_is_no_set_is_refused(tmp_path: Path, folder: Path) -> None:
    for path in ("nowhere", "nowhere.parquet", "nowhere.npy"):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            _ = EvaluationSet(path=str(tmp_path / path)).id
    (folder / "c.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"evaluation picture c\.png in .* cannot be read"):
        EvaluationSet(path=str(folder)).pictures()
    pq.write_table(pa.table({"other": [1]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="needs rows and a column sha256 or pdq"):
        EvaluationSet(path=str(tmp_path / "other.parquet")).pictures()
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="is no parquet file"):
        EvaluationSet(path=str(tmp_path / "broken.parquet")).pictures()
    np.save(tmp_path / "flat.npy", np.zeros(3))
    with pytest.raises(ValueError, match="one vector of floats a picture"):
        EvaluationSet(path=str(tmp_path / "flat.npy")).embeddings()
    with pytest.raises(ValueError, match=r"must be a \.npy or \.parquet file of embeddings"):
        EvaluationSet(path=str(folder)).embeddings()


def test_a_hash_is_of_the_picture_as_it_is_seen() -> None:
    image = natural_picture(np.random.default_rng(2))
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.transpose(Image.Transpose.ROTATE_90).save(out, "JPEG", quality=92, exif=exif)
    turned, upright = pdq_of(out.getvalue()), pdq_of(jpeg(image))
    assert turned[1] > 50 and sum((a ^ b).bit_count() for a, b in zip(turned[0], upright[0])) < 10
