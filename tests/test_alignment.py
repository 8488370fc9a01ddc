"""What tells that an index answers with its own rows: counts, rows asked for by their own vectors, exact search."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.clip_retrieval import alignment
from jobs.clip_retrieval.alignment import KINDS, check_counts, check_index
from tests.searchable import ExactInside


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alignment, "Inside", ExactInside)


def lay_out(folder: Path, counts: list[int], width: int = 16, equal: int = 0) -> Path:
    """Embeddings in files of so many rows; the first `equal` vectors are the same one."""
    rng = np.random.default_rng(3)
    for name in ("img_emb", "text_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    for place, count in enumerate(counts):
        for kind in ("img_emb", "text_emb"):
            vectors = rng.normal(size=(count, width))
            if place == 0 and equal:
                vectors[:equal] = 1.0
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            np.save(folder / kind / f"{kind}_{place}.npy", vectors.astype(np.float16))
        pq.write_table(
            pa.table({"key": [f"{place}-{n}" for n in range(count)]}), folder / f"metadata/metadata_{place}.parquet"
        )
    return folder


def make(embeddings: Path, out: Path) -> Path:
    out.mkdir()
    ExactInside("index", str(embeddings), str(out))
    return out


def test_an_aligned_index_finds_all_its_rows(tmp_path: Path) -> None:
    embeddings = lay_out(tmp_path / "e", [30, 1, 50, 7], equal=15)  # equal vectors find each other, which is no fault
    files = check_counts(embeddings)
    assert files == {
        "metadata_0.parquet": 30,
        "metadata_1.parquet": 1,
        "metadata_2.parquet": 50,
        "metadata_3.parquet": 7,
    }
    index = make(embeddings, tmp_path / "i")
    for kind in KINDS:
        found = check_index(embeddings, index, files, kind)
        assert found.found == 1.0 and found.recall == 1.0


def test_other_counts_are_refused(tmp_path: Path) -> None:
    embeddings = lay_out(tmp_path / "e", [5, 6])
    np.save(embeddings / "text_emb/text_emb_1.npy", np.zeros((5, 16), np.float16))
    with pytest.raises(
        ValueError, match=r"text_emb_1.npy has 5 rows and metadata_1.parquet 6: nothing but the position"
    ):
        check_counts(embeddings)


@pytest.mark.parametrize("wrong", ["files swapped", "last file reversed", "shifted"])
def test_another_order_is_found(tmp_path: Path, wrong: str) -> None:
    embeddings = lay_out(tmp_path / "e", [200, 200, 200, 200])
    index = make(embeddings, tmp_path / "i")
    vectors = np.load(index / "image.index")
    if wrong == "files swapped":
        vectors = np.concatenate([vectors[:400], vectors[600:], vectors[400:600]])
    elif wrong == "last file reversed":
        vectors[600:] = vectors[600:][::-1].copy()
    else:
        vectors = np.roll(vectors, 1, axis=0)
    with (index / "image.index").open("wb") as file:
        np.save(file, vectors)
    with pytest.raises(ValueError, match=r"image.index does not answer with its own rows .* not that of the metadata"):
        check_index(embeddings, index, check_counts(embeddings), "picture")


def test_other_numbers_of_rows_are_found(tmp_path: Path) -> None:
    embeddings = lay_out(tmp_path / "e", [20, 20])
    index = make(embeddings, tmp_path / "i")
    with (index / "text.index").open("wb") as file:
        np.save(file, np.zeros((39, 16), np.float32))
    with pytest.raises(ValueError, match=r"'rows': 39, .* and the embeddings 40 rows of 16"):
        check_index(embeddings, index, check_counts(embeddings), "caption")


def test_recall_counts_what_exact_search_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Half(ExactInside):
        """Knows only the even rows."""

        def ask(self, *, vectors: list[list[float]], count: int) -> dict:
            found = super().ask(vectors=vectors, count=1000)["positions"]
            return {"positions": [([n for n in row if n % 2 == 0] + [-1] * count)[:count] for row in found]}

    monkeypatch.setattr(alignment, "SAMPLED_ROWS", 9)
    embeddings = lay_out(tmp_path / "e", [101])  # sampled are rows 0, 12, 25, …: of nine, five are even
    index = make(embeddings, tmp_path / "i")
    monkeypatch.setattr(alignment, "Inside", Half)
    found = check_index(embeddings, index, check_counts(embeddings), "picture")
    assert 0.5 <= found.found < 1.0 and 0.35 < found.recall < 0.65
