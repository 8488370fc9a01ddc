"""image embedding → keep or drop: of pictures that show the same the first in ingest order stays (as SemDeDup would have it,
Abbas et al. 2023, arXiv 2303.09540, but without clusters, so that later pictures never change what became of earlier ones).

Embeddings are compared by the signs of their products with random vectors (Charikar 2002): of 1024 signs two embeddings at
an angle differ in 1024 · angle / π on average. So a cosine of 0.96 is told to within 0.008, one of 0.98 to within 0.005
(one standard deviation), from 128 bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.sample import LISTED
from pipeline.stage import Columns, Needs, Stage

from .evaluation_set import EvaluationSet
from .first_come import FirstCome, Forbidden
from .near import Banding, Index, Signatures

_SIGNS = 1024
_STEEPEST = 16  # the random vectors' whole numbers are at most so large
_PRIOR = 64  # rows at the origin that the first rows' mean is taken with


@dataclass(frozen=True, kw_only=True)
class DeduplicateSemanticConfig:
    """What counts as showing the same."""

    min_cosine: float = 0.96
    """Cosine of two pictures' embeddings from which the later one goes. Depends on the model: look at pairs that were dropped
    (their `cosine` is recorded) before you settle."""
    banding: Banding = field(default_factory=lambda: Banding(bands=16, bits=25))
    """How near embeddings are looked up, and so how many of them are found: see there."""
    evaluation: str | None = None
    """Embeddings, by the same model, of pictures that the dataset must not hold: a .npy file (one row a picture) or a parquet
    file with a column image_embedding, at any fsspec URL."""
    needs: Needs = field(default_factory=lambda: Needs(cpus=1.0))
    """What the one actor takes. Memory: 400 bytes for each sample that stays."""

    def __post_init__(self) -> None:
        if not 0.7 <= self.min_cosine < 1:
            raise ValueError(f"min_cosine must be at least 0.7 and less than 1, got {self.min_cosine}")
        if self.banding.bands * self.banding.bits > _SIGNS:
            raise ValueError(f"banding: bands times bits must be {_SIGNS} at most, got {self.banding}")

    @property
    def near(self) -> int:
        """Signs, at most, in which two embeddings differ that count as the same."""
        return round(math.acos(self.min_cosine) / math.pi * _SIGNS)


class DeduplicateSemantic(Stage):
    """Reads image_embedding and whether the source lists the sample; writes duplicate_of (the key of the sample that stays), the
    cosine to it, and evaluation_item (which of the evaluation pictures it is like). Which sample stays: see `FirstCome`.
    """

    name = "deduplicate_semantic"
    reads = ("image_embedding", LISTED)
    writes = pa.schema([("duplicate_of", pa.string()), ("cosine", pa.float32()), ("evaluation_item", pa.string())])
    ordered = True
    config: DeduplicateSemanticConfig

    def __init__(self, config: DeduplicateSemanticConfig) -> None:
        super().__init__(config)
        self._evaluation = EvaluationSet(path=config.evaluation) if config.evaluation else None

    @property
    def batch_size(self) -> int:
        """Fixed, for the first batch counts: see `_Signs`."""
        return 4096

    def identity(self) -> Any:
        """The settings, with the evaluation set's content in place of its path."""
        return {**super().identity(), "evaluation": self._evaluation.id if self._evaluation else None}

    def load(self) -> None:
        """Starts with nothing seen; the first batch tells how long the embeddings are."""
        self._signs: _Signs | None = None

    def process(self, batch: pa.Table) -> Columns:
        """Marks every row that shows what was shown before."""
        column = batch.column("image_embedding")
        if self._signs is None:
            self._start(column)
        if self._signs is None:
            none, count = [None] * len(column), len(column)
            blank = {"duplicate_of": none, "cosine": none, "evaluation_item": none}
            return {**blank, "status": ["failed"] * count, "reason": ["bad_embedding"] * count}
        vectors, sound = _vectors(column, self._signs.width)
        kinds = [Signatures(words=self._signs.of(vectors), valid=sound)]
        verdicts = self.first_come.judge(batch, kinds, {"bad_embedding": ~sound})
        cosines = [None if d is None else math.cos(math.pi * d / _SIGNS) for d in verdicts.distance]
        return {**verdicts.columns, "cosine": cosines}

    def _start(self, column: pa.ChunkedArray) -> None:
        """Random vectors of the embeddings' usual length, and what is held against them; nothing where there is none."""
        lengths = pc.list_value_length(column).fill_null(0).to_numpy()
        vectors, sound = _vectors(column, max(int(np.bincount(lengths).argmax()), 1))
        if not sound.any():
            return
        self._signs = _Signs(vectors[sound], self.config.banding)
        forbidden = self._forbidden(self._signs, self._evaluation) if self._evaluation else None
        self.first_come = FirstCome({"semantic_duplicate": self._index}, forbidden)

    def _index(self) -> Index:
        banding = self.config.banding
        extra = -(-banding.bands * banding.bits // 64)
        return Index(words=_SIGNS // 64, near=self.config.near, banding=banding, extra=extra)

    def _forbidden(self, signs: _Signs, evaluation: EvaluationSet) -> Forbidden:
        names, vectors = evaluation.embeddings()
        if vectors.shape[1] != signs.width:
            raise ValueError(
                f"evaluation {evaluation.path} has vectors of {vectors.shape[1]} numbers, the pictures' have "
                f"{signs.width}: embed both with one model"
            )
        kinds = [Signatures(words=signs.of(vectors), valid=np.ones(len(names), bool))]
        return Forbidden(names, [self._index()], kinds)


class _Signs:
    """Embeddings → the signs of their products with random vectors.

    Distances count plain signs. The bands are cut from signs against the mean of the first batch: embeddings lie in a cone
    (their mean cosine is far above 0), so that most share most of their plain signs, and their bands would crowd. Values are
    rounded to whole numbers whose products add up to less than 2^24, so that float32 is exact: the same signs on any
    machine, in batches of any size.
    """

    def __init__(self, first: np.ndarray, banding: Banding) -> None:
        """`first` are the first batch's vectors (rows, width)."""
        self.width = first.shape[1]
        raw = np.random.PCG64(0).random_raw(self.width * _SIGNS // 2).view(np.uint32)
        bits = np.bitwise_count(raw).astype(np.float32) - _STEEPEST  # binomial, so all but normal
        self._random = bits.reshape(self.width, _SIGNS)
        self._banded = banding.bands * banding.bits
        self._middle = self._products(first)[:, : self._banded].sum(axis=0, dtype=np.float64) / (len(first) + _PRIOR)

    def of(self, vectors: np.ndarray) -> np.ndarray:
        """uint64 (rows, words): 1024 plain signs, then those that the bands are cut from."""
        products = self._products(vectors)
        banded = np.zeros((len(vectors), -(-self._banded // 64) * 64), bool)
        banded[:, : self._banded] = products[:, : self._banded] > self._middle
        bits = np.packbits(np.hstack([products > 0, banded]), axis=1, bitorder="little")
        return bits.view(np.uint64)

    def _products(self, vectors: np.ndarray) -> np.ndarray:
        largest = np.maximum(np.abs(vectors).max(axis=1, keepdims=True, initial=0), np.finfo(np.float32).tiny)
        return np.rint(vectors / largest * (2**24 // (_STEEPEST * self.width))) @ self._random


def _vectors(column: pa.ChunkedArray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(float32 (rows, width), bool (rows,): where the value is a vector of that width with a direction); zeros else."""
    sound = pc.fill_null(pc.equal(pc.list_value_length(column), width), False)
    flat = column.filter(sound).combine_chunks().flatten().to_numpy(zero_copy_only=False)
    rows = sound.to_numpy().copy()
    vectors = np.zeros((len(rows), width), np.float32)
    vectors[rows] = flat.reshape(-1, width)
    rows &= np.isfinite(vectors).all(axis=1) & vectors.any(axis=1)
    vectors[~rows] = 0
    return vectors, rows
