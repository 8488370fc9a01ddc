"""Whether an index answers with the rows that it was made of. clip-retrieval joins vectors and metadata by position alone and
checks nothing, so here it is: counts before the index is built, and afterwards rows that are asked for by their own vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from .environment import Inside

KINDS = {"picture": ("img_emb", "image"), "caption": ("text_emb", "text")}
"""What a vector is of → its folder of embeddings, and its index in clip-retrieval's words."""
NEIGHBOURS = 10
SAMPLED_FILES, SAMPLED_ROWS, QUERIES = 64, 8, 100
NEAR = 1e-3  # cosines that differ by less are equal: vectors are kept in 16 bits
CHUNK = 1 << 16  # vectors that are in memory at a time


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What was found of one index."""

    found: float
    """Share of sampled rows that are among the neighbours of their own vector."""
    recall: float
    """Of the nearest `NEIGHBOURS` by exact search, the share that the index finds, for queries of the other kind (a caption's
    vector among pictures, a picture's among captions)."""


def check_counts(embeddings: Path) -> dict[str, int]:
    """Rows of each metadata file, by name and in order. Raises ValueError where vectors have other rows than metadata."""
    rows = {}
    for file in sorted((embeddings / "metadata").glob("*.parquet")):
        place = file.stem.removeprefix("metadata_")
        rows[file.name] = pq.read_metadata(file).num_rows
        for folder, _ in KINDS.values():
            vectors = np.load(embeddings / folder / f"{folder}_{place}.npy", mmap_mode="r")
            if len(vectors) != rows[file.name]:
                raise ValueError(
                    f"{embeddings}: {folder}_{place}.npy has {len(vectors)} rows and {file.name} {rows[file.name]}: "
                    "nothing but the position joins them, so no index is made of these"
                )
    return rows


def check_index(embeddings: Path, index: Path, files: Mapping[str, int], kind: str) -> Checked:
    """Asks an index for rows by their own vectors. Raises ValueError where it has other rows than the embeddings, or another
    order: where hardly a row of a file is found, or not half of all.
    """
    folder, name = KINDS[kind]
    own = _Vectors(embeddings / folder, files)
    rows = _sample(files)
    spots = [spot for group in rows for spot in group]
    vectors = own.at(spots)
    with Inside("search", str(index / f"{name}.index")) as inside:
        told = inside.hear()
        if told != {"rows": own.rows, "width": own.width}:
            raise ValueError(f"{index}/{name}.index holds {told}, and the embeddings {own.rows} rows of {own.width}")
        near = _neighbours(inside, vectors)
        queries = _other(embeddings, files, kind).at(_spread(own.rows, QUERIES))
        asked = _neighbours(inside, queries)
    itself = [
        spot in answer or float(own.at(answer[:1])[0] @ vector) > 1 - NEAR  # another row may have an equal vector
        for spot, vector, answer in zip(spots, vectors, near, strict=True)
    ]
    groups = np.split(np.array(itself), np.cumsum([len(group) for group in rows])[:-1])
    # By chance a row is among ten neighbours of any vector, so one of a file is none.
    if np.mean(itself) < 0.5 or any(len(group) == SAMPLED_ROWS and group.sum() < 2 for group in groups):
        raise ValueError(
            f"{index}/{name}.index does not answer with its own rows (of {len(itself)} asked for by their own vector, "
            f"{sum(itself)} were found): its order is not that of the metadata"
        )
    return Checked(found=float(np.mean(itself)), recall=_recall(own, queries, asked))


class _Vectors:
    """The vectors of a folder by their position over all files; only what is asked for is read."""

    def __init__(self, folder: Path, files: Mapping[str, int]) -> None:
        names = [f"{folder.name}_{Path(file).stem.removeprefix('metadata_')}.npy" for file in files]
        self._files = [np.load(folder / name, mmap_mode="r") for name in names]
        self._ends = np.cumsum([len(file) for file in self._files])
        self.rows, self.width = int(self._ends[-1]), int(self._files[0].shape[1])

    def at(self, spots: Sequence[int]) -> np.ndarray:
        """float32 (N, width)."""
        found = []
        for spot in spots:
            place = int(np.searchsorted(self._ends, spot, side="right"))
            found.append(self._files[place][spot - self._ends[place] + len(self._files[place])])
        return np.array(found, np.float32)

    def best(self, queries: np.ndarray, count: int) -> np.ndarray:
        """The highest cosines of each query, by exact search, rising: float32 (N, count)."""
        best = np.full((len(queries), count), -np.inf, np.float32)
        for file in self._files:
            for start in range(0, len(file), CHUNK):
                cosines = queries @ np.asarray(file[start : start + CHUNK], np.float32).T
                best = np.sort(np.concatenate([best, cosines], axis=1), axis=1)[:, -count:]
        return best


def _other(embeddings: Path, files: Mapping[str, int], kind: str) -> _Vectors:
    (folder,) = (folder for other, (folder, _) in KINDS.items() if other != kind)
    return _Vectors(embeddings / folder, files)


def _sample(files: Mapping[str, int]) -> list[list[int]]:
    """Positions of some rows of some files, spread evenly; by file."""
    ends = np.cumsum([*files.values()])
    chosen = _spread(len(files), SAMPLED_FILES)
    counts = [*files.values()]
    return [[int(ends[n]) - counts[n] + row for row in _spread(counts[n], SAMPLED_ROWS)] for n in chosen]


def _spread(total: int, count: int) -> list[int]:
    return sorted({int(spot) for spot in np.linspace(0, total - 1, min(total, count))})


def _neighbours(inside: Inside, vectors: np.ndarray) -> list[list[int]]:
    answers = inside.ask(vectors=vectors.tolist(), count=NEIGHBOURS)["positions"]
    return [[spot for spot in answer if spot >= 0] for answer in answers]


def _recall(own: _Vectors, queries: np.ndarray, asked: Sequence[Sequence[int]]) -> float:
    """Any row as near as the last of the exact ones counts: of equal captions there are many."""
    count = min(NEIGHBOURS, own.rows)
    least = own.best(queries, count)[:, 0]
    hits = [
        int((own.at(answer) @ query >= limit - NEAR).sum()) if answer else 0
        for query, limit, answer in zip(queries, least, asked, strict=True)
    ]
    return sum(hits) / (count * len(queries))
