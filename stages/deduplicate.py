"""sha256, perceptual hash → keep or drop: of pictures that are the same the first in ingest order stays; the others name it.

Equal bytes always count. With `near`, so do pictures whose PDQ hashes (Facebook 2019, github.com/facebook/ThreatExchange:
256 bits of a 64 x 64 luminance's cosine transform) differ in few bits: compressed anew, resized, brightened. What is too
plain to be told by such a hash is only compared by its bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.sample import LISTED
from pipeline.stage import Columns, Needs, Stage

from .evaluation_set import EvaluationSet
from .first_come import FirstCome, Forbidden
from .flat import fixed_bytes, from_hex
from .near import Banding, Index, Signatures

_DIGEST, _PDQ = 32, 32  # bytes
_KEPT_WORDS = 2  # of a digest: 128 bits, so that two of a billion are taken for one with probability 1e-21
_EVERY = Banding(bands=16, bits=16)  # finds every pair up to a distance of 31; for sets that are small beside 2^16
# Neighbours in the hash change together, so each goes into another band.
_ORDER = np.argsort((np.arange(8 * _PDQ) * 163) % (8 * _PDQ))


@dataclass(frozen=True, kw_only=True)
class DeduplicateConfig:
    """What counts as the same picture."""

    near: int | None = None
    """Bits, at most, in which the PDQ hashes of near duplicates differ: 31 is what its authors recommend for `the same
    picture`, 16 is careful, two unlike pictures differ in 128 ± 8. None: equal bytes only, and no hash is read."""
    min_quality: int = 50
    """PDQ's own measure, 0 to 100, below which a hash tells nothing: plain areas, blank pages. Its authors': 50."""
    banding: Banding = field(default_factory=Banding)
    """How near hashes are looked up, and so how many of them are found: see there."""
    evaluation: str | None = None
    """Pictures that the dataset must not hold: a folder of them or a parquet file with a column sha256 or pdq, at any fsspec
    URL. What has their bytes, or is within `near` of them, is dropped."""
    batch_size: int = 65536
    """Rows looked at in one go."""
    needs: Needs = field(default_factory=lambda: Needs(cpus=0.25))
    """What the one actor takes. Memory: 40 bytes for each sample that stays, with `near` 200."""

    def __post_init__(self) -> None:
        if self.near is not None and not 0 <= self.near <= 64:
            raise ValueError(f"near must be 0 to 64 bits of 256, or None, got {self.near}")
        if not 0 <= self.min_quality <= 100:
            raise ValueError(f"min_quality must be 0 to 100, got {self.min_quality}")
        if self.banding.bands * self.banding.bits > 8 * _PDQ:
            raise ValueError(f"banding: bands times bits must be {8 * _PDQ} at most, got {self.banding}")


class Deduplicate(Stage):
    """Reads sha256, whether the source lists the sample and, for near duplicates, pdq and pdq_quality; writes duplicate_of (the
    key of the sample that stays), the distance in bits of a near duplicate, and evaluation_item (which of the evaluation
    pictures it is near). Which sample stays: see `FirstCome`.
    """

    name = "deduplicate"
    writes = pa.schema([("duplicate_of", pa.string()), ("distance", pa.int16()), ("evaluation_item", pa.string())])
    ordered = True
    config: DeduplicateConfig

    def __init__(self, config: DeduplicateConfig) -> None:
        super().__init__(config)
        self._evaluation = EvaluationSet(path=config.evaluation) if config.evaluation else None
        self.reads = ("sha256", LISTED) if config.near is None else ("sha256", "pdq", "pdq_quality", LISTED)

    def identity(self) -> Any:
        """The settings, with the evaluation set's content in place of its path."""
        unused = {"min_quality", "banding"} if self.config.near is None else set()
        settings = {name: value for name, value in super().identity().items() if name not in unused}
        return {**settings, "evaluation": self._evaluation.id if self._evaluation else None}

    def load(self) -> None:
        """Starts with nothing seen."""
        forbidden = self._forbidden(self._evaluation) if self._evaluation else None
        self.first_come = FirstCome({"duplicate": _exact, **self._near(self.config.banding)}, forbidden)

    def process(self, batch: pa.Table) -> Columns:
        """Marks every row whose picture came before."""
        kinds, bad = self._signatures(batch)
        verdicts = self.first_come.judge(batch, kinds, bad)
        return {**verdicts.columns, "distance": verdicts.distance}

    def _near(self, banding: Banding) -> dict[str, Any]:
        near = self.config.near
        return {} if near is None else {"near_duplicate": lambda: Index(words=_PDQ // 8, near=near, banding=banding)}

    def _forbidden(self, evaluation: EvaluationSet) -> Forbidden:
        pictures = evaluation.pictures()
        kinds, bad = self._signatures(pictures)
        wrong = [name for name, rows in bad.items() if (rows & pictures.column(name[4:]).is_valid().to_numpy()).any()]
        if wrong:
            raise ValueError(
                f"evaluation {evaluation.path} has rows whose {wrong[0][4:]} is none: mend or leave them out"
            )
        if not kinds[-1].valid.any():
            wanted = "sha256" if self.config.near is None else "pdq"
            raise ValueError(f"evaluation {evaluation.path} has no {wanted}, by which pictures are compared: add it")
        indexes = [_exact(), *(make() for make in self._near(_EVERY).values())]
        return Forbidden(pictures.column("name").to_pylist(), indexes, kinds)

    def _signatures(self, rows: pa.Table) -> tuple[list[Signatures], dict[str, np.ndarray]]:
        """Signatures by digest and perhaps by hash; and by reason, which rows cannot be judged."""
        digests, fits = from_hex(rows.column("sha256"), _DIGEST)
        words = np.ascontiguousarray(digests).view(np.uint64)[:, :_KEPT_WORDS]
        kinds, bad = [Signatures(words=words, valid=fits)], {"bad_sha256": ~fits}
        if self.config.near is not None:
            hashes, fits = fixed_bytes(rows.column("pdq"), _PDQ)
            bad["bad_pdq"] = ~fits & rows.column("pdq").is_valid().to_numpy()
            quality = rows.column("pdq_quality").fill_null(0).to_numpy()
            bits = np.unpackbits(hashes, axis=1).take(_ORDER, axis=1)
            words = np.packbits(bits, axis=1).view(np.uint64)
            kinds.append(Signatures(words=words, valid=fits & (quality >= self.config.min_quality)))
        return kinds, bad


def _exact() -> Index:
    """Digests are signatures too, of which no bit may differ."""
    return Index(words=_KEPT_WORDS, near=0, banding=Banding(bands=1, bits=64, flips=0))
