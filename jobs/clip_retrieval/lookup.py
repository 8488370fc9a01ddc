"""A vector → the samples whose pictures or captions lie nearest, from an index and its metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.storage import Folder
from pipeline.tables import read_parquet
from pipeline.tombstones import Tombstones

from .alignment import KINDS
from .built import Built, taken_down
from .environment import Inside


@dataclass(frozen=True, kw_only=True)
class Hit:
    """A sample that was found."""

    key: str
    score: float
    """Cosine between the query and the sample's picture or caption."""
    caption: str
    url: str


def look_up(
    folder: Path, built: Built, vector: np.ndarray, *, kind: str, count: int, tombstones: Tombstones
) -> list[Hit]:
    """The `count` nearest samples that were not taken down, the best first. Raises ValueError for a vector of another width,
    FileNotFoundError where a newer index has taken this one's place.
    """
    version = folder / built.version
    if not version.is_dir():
        raise FileNotFoundError(f"{version} is gone: a newer index has taken its place, so ask again")
    hits: list[Hit] = []
    with Inside("search", str(version / f"{KINDS[kind][1]}.index")) as inside:
        told = inside.hear()
        assert told is not None
        if told["width"] != len(vector):
            raise ValueError(
                f"the query has {len(vector)} numbers and the index {told['width']}: run `densebridge index`"
            )
        asked, previous = count, 0
        # Of what is found some may have been taken down: then there is more to be found.
        while len(hits) < count and asked > previous:
            answer = inside.ask(vectors=[vector.tolist()], count=asked)
            hits = _shown(version, built.files, answer["positions"][0], answer["scores"][0], tombstones)[:count]
            previous, asked = asked, min(4 * asked, built.rows)
    return hits


def _shown(
    version: Path, files: Mapping[str, int], positions: Sequence[int], scores: Sequence[float], tombstones: Tombstones
) -> list[Hit]:
    """The samples at these positions that were not taken down, in the order given."""
    names, ends = list(files), np.cumsum([*files.values()])
    there = [rank for rank, spot in enumerate(positions) if spot >= 0]  # -1: an approximate index found no more
    spots = np.array([positions[rank] for rank in there], np.int64)
    places = np.searchsorted(ends, spots, side="right")
    found: dict[int, Hit] = {}
    metadata = Folder(url=str(version / "metadata"))
    for place in np.unique(places).tolist():
        of_file = np.flatnonzero(places == place)
        first = int(ends[place]) - files[names[place]]
        rows = read_parquet(metadata, names[place]).take(pa.array(spots[of_file] - first))
        gone = taken_down(rows, tombstones).to_pylist()
        for rank, row, is_gone in zip(of_file.tolist(), rows.to_pylist(), gone, strict=True):
            if not is_gone:
                told = {name: row[name] or "" for name in ("key", "caption", "url")}
                found[rank] = Hit(**told, score=round(float(scores[there[rank]]), 4))
    return [found[rank] for rank in sorted(found)]
