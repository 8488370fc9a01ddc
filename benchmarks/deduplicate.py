"""What de-duplication costs and what it finds: `python -m benchmarks.deduplicate --rows 1000000 2000000 4000000`.

At each size, each way in a process of its own: a stream of samples of which one in twenty repeats an earlier one (the same
bytes; or a perceptual hash that differs in 0 to 31 random bits) goes through the stage in partitions of 5,000. Beside it
what one would write first: a dict of digests; all pairs of hashes, on a small sample. Then real files of natural-like
pictures, changed as the web changes them; and embeddings in a cone, as CLIP's are. Time is the processor's, in the stage
alone. Prints tables and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.sample import sample_key

from .picture_variants import VARIANTS, jpeg, natural_picture

PARTITION = 5000
FARTHEST = 31
BYTES_ONLY = 4  # of 20 repeats: those with the very same bytes
COSINES = (0.9, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99)
WIDTH = 512


def _mixed(numbers: np.ndarray, stream: int, words: int) -> np.ndarray:
    """uint64 (rows, words) that look random and depend on number and stream alone (splitmix64, Steele et al. 2014)."""
    x: np.ndarray = numbers.astype(np.uint64)[:, None] * np.uint64(words) + np.arange(words, dtype=np.uint64)
    x = (x + np.uint64(stream << 56)) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ x >> np.uint64(shift)) * np.uint64(factor)
    return x ^ x >> np.uint64(31)


def _hex(words: np.ndarray, width: int) -> pa.Array:
    text = np.ascontiguousarray(words).tobytes().hex().encode()
    whole = np.frombuffer(text, np.uint8).reshape(len(words), -1)[:, :width]
    return (
        pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(width), len(words), [None, pa.py_buffer(np.ascontiguousarray(whole))]
        )
        .cast(pa.binary())
        .cast(pa.string())
    )


def partitions(rows: int) -> Iterator[tuple[pa.Table, np.ndarray, np.ndarray]]:
    """(key, sha256, pdq, pdq_quality, listed of 5,000 samples; which earlier one each repeats, or -1; in how many bits of
    the hash it differs from it, or -1 where its bytes are the same).
    """
    for start in range(0, rows, PARTITION):
        numbers = np.arange(start, min(start + PARTITION, rows))
        told = _mixed(numbers, 1, 3)
        original = (told[:, 0] % np.maximum(numbers, 1).astype(np.uint64)).astype(np.int64)
        repeats = (told[:, 1] % 20 == 0) & (_mixed(original, 1, 3)[:, 1] % 20 != 0) & (numbers > 0)
        distance = (told[:, 2] % (FARTHEST + 1 + BYTES_ONLY)).astype(np.int64) - BYTES_ONLY
        distance = np.where(repeats, np.maximum(distance, -1), 0)
        original = np.where(repeats, original, -1)
        source = np.where(repeats, original, numbers)
        hashes = np.ascontiguousarray(_mixed(source, 2, 4)).view(np.uint8)
        for row in np.flatnonzero(repeats & (distance > 0)):
            bits = np.random.default_rng(int(numbers[row])).choice(256, distance[row], replace=False)
            np.bitwise_xor.at(hashes[row], bits // 8, np.uint8(1) << (bits % 8).astype(np.uint8))
        pdq = pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), len(numbers), [None, pa.py_buffer(hashes)])
        columns = {
            "key": _hex(_mixed(numbers, 3, 2), 24),
            "sha256": _hex(_mixed(np.where(distance < 0, source, numbers), 4, 4), 64),
            "pdq": pdq.cast(pa.binary()),
            "pdq_quality": pa.array(np.full(len(numbers), 100, np.int16)),
            "listed": pa.array(np.ones(len(numbers), bool)),
        }
        yield pa.table(columns), original, distance


class Dictionaries:
    """What one would write first for equal bytes: digest → key, row by row."""

    def __init__(self) -> None:
        self._first: dict[bytes, str] = {}

    def process(self, batch: pa.Table) -> dict[str, list[Any]]:
        """The key of each row's original."""
        pairs = zip(batch.column("key").to_pylist(), batch.column("sha256").to_pylist(), strict=True)
        firsts = [(self._first.setdefault(bytes.fromhex(sha), key), key) for key, sha in pairs]
        return {"duplicate_of": [None if first == key else first for first, key in firsts]}


def stream(way: str, rows: int) -> dict[str, Any]:
    """Runs one way over so many rows, in this process."""
    from stages.deduplicate import Deduplicate, DeduplicateConfig

    stage: Any = Dictionaries()
    if way != "dict":
        stage = Deduplicate(DeduplicateConfig(near=FARTHEST if way == "near" else None))
        stage.load()
    seconds, wrong = 0.0, 0
    planted, found = Counter[int](), Counter[int]()
    began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for table, original, distance in partitions(rows):
        started = time.process_time()
        columns = stage.process(table)
        seconds += time.process_time() - started
        keys = _hex(_mixed(np.maximum(original, 0), 3, 2), 24).to_pylist()
        for key, named, spot, bits in zip(keys, columns["duplicate_of"], original.tolist(), distance.tolist()):
            if spot >= 0:
                planted[bits] += 1
                found[bits] += named == key
            wrong += named is not None and (spot < 0 or named != key)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - began) * 1024
    told = {"way": way, "rows": rows, "rows_per_second": round(rows / seconds), "seconds": round(seconds, 2)}
    if way != "dict":
        told |= {"bytes_a_sample": round(stage.first_come.bytes / rows, 1), "crowded": stage.first_come.crowded}
    recall = {str(bits): round(found[bits] / planted[bits], 4) for bits in sorted(planted)}
    return {**told, "peak_bytes_a_sample": round(peak / rows, 1), "wrong": wrong, "recall": recall}


def all_pairs(rows: int) -> dict[str, Any]:
    """Every hash against all before it."""
    words = _mixed(np.arange(rows), 2, 4)
    started = time.process_time()
    near = sum(
        int((np.bitwise_count(words[spot] ^ words[:spot]).sum(axis=1) <= FARTHEST).sum()) for spot in range(1, rows)
    )
    seconds = time.process_time() - started
    return {
        "way": "all pairs",
        "rows": rows,
        "rows_per_second": round(rows / seconds),
        "seconds": round(seconds, 2),
        "near": near,
    }


def pictures(count: int) -> dict[str, Any]:
    """By change: median distance and the share that goes as a near duplicate of its own original, at 31 and at 16."""
    from stages.deduplicate import Deduplicate, DeduplicateConfig
    from stages.evaluation_set import pdq_of

    rng = np.random.default_rng(0)
    originals = [natural_picture(rng) for _ in range(count)]
    kinds = {"original": jpeg, **VARIANTS}
    files = [vary(picture) for vary in kinds.values() for picture in originals]
    hashes, quality = zip(*map(pdq_of, files))
    keys = [sample_key(str(n)) for n in range(len(files))]
    table = pa.table(
        {
            "key": keys,
            "sha256": [hashlib.sha256(file).hexdigest() for file in files],
            "pdq": pa.array(hashes, pa.binary()),
            "pdq_quality": pa.array(quality, pa.int16()),
            "listed": [True] * len(files),
        }
    )
    bits = np.frombuffer(b"".join(hashes), np.uint8).reshape(len(kinds), count, 32)
    medians = np.median(np.bitwise_count(bits ^ bits[0]).sum(axis=2), axis=1)
    told = {kind: {"median_distance": float(median)} for kind, median in zip(kinds, medians)}
    wrong = {}
    for near in (31, 16):
        stage = Deduplicate(DeduplicateConfig(near=near))
        stage.load()
        originals_of = np.array(stage.process(table)["duplicate_of"], object).reshape(len(kinds), count)
        numbers = {key: n % count for n, key in enumerate(keys)}
        for kind, named in zip(kinds, originals_of):
            told[kind][f"found_{near}"] = round(sum(numbers.get(k) == n for n, k in enumerate(named)) / count, 3)
        rows = enumerate(originals_of.ravel())
        wrong[str(near)] = sum(named is not None and numbers[named] != n % count for n, named in rows)
    del told["original"]
    return {"pictures": count, "changes": told, "wrong": wrong}


def semantic(rows: int) -> dict[str, Any]:
    """Unit vectors with a mean cosine of 0.5 and a spectrum that falls as 1/k; one in ten at a known cosine to another."""
    from stages.deduplicate_semantic import DeduplicateSemantic, DeduplicateSemanticConfig

    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0].astype(np.float32)
    spectrum = (1 / np.arange(1, WIDTH + 1)).astype(np.float32)
    axes_scaled = np.sqrt(spectrum / spectrum.sum())[:, None] * axes

    def unit(vectors: np.ndarray) -> np.ndarray:
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def cloud(count: int) -> np.ndarray:
        return rng.standard_normal((count, WIDTH), np.float32) @ axes_scaled

    stage = DeduplicateSemantic(DeduplicateSemanticConfig())
    stage.load()
    seconds, wrong = 0.0, 0
    planted, found = Counter[float](), Counter[float]()
    for start in range(0, rows, PARTITION):
        vectors = unit(cloud(PARTITION) + axes[WIDTH // 2])
        repeats = np.arange(PARTITION // 2, PARTITION, 5)
        cosines = rng.choice(COSINES, len(repeats)).astype(np.float32)[:, None]
        earlier = vectors[repeats - PARTITION // 2]
        aside = cloud(len(repeats))
        aside = unit(aside - (aside * earlier).sum(axis=1, keepdims=True) * earlier)
        vectors[repeats] = cosines * earlier + np.sqrt(1 - cosines**2) * aside
        flat = pa.array(vectors.astype(np.float16).ravel())
        lists = pa.ListArray.from_arrays(np.arange(0, flat.offset + len(flat) + 1, WIDTH, dtype=np.int32), flat)
        keys = _hex(_mixed(np.arange(start, start + PARTITION), 3, 2), 24)
        table = pa.table({"key": keys, "image_embedding": lists, "listed": [True] * PARTITION})
        named: list[str | None] = []
        for batch in range(0, PARTITION, stage.batch_size):
            started = time.process_time()
            named += stage.process(table.slice(batch, stage.batch_size))["duplicate_of"]
            seconds += time.process_time() - started
        for row, cosine in zip(repeats.tolist(), cosines[:, 0].tolist()):
            planted[round(cosine, 3)] += 1
            found[round(cosine, 3)] += named[row] == keys[row - PARTITION // 2].as_py()
        wrong += sum(n is not None for row, n in enumerate(named) if row not in set(repeats.tolist()))
    return {
        "rows": rows,
        "rows_per_second": round(rows / seconds),
        "bytes_a_sample": round(stage.first_come.bytes / rows, 1),
        "crowded": stage.first_come.crowded,
        "wrong": wrong,
        "found": {str(c): round(found[c] / planted[c], 4) for c in sorted(planted)},
    }


def in_child(job: str, *given: str) -> dict[str, Any]:
    """A measurement in a process of its own, so that its memory is its own."""
    command = [sys.executable, "-m", "benchmarks.deduplicate", "--child", job, *given]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(out.splitlines()[-1])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[1_000_000, 2_000_000, 4_000_000], help="of the streams")
    parser.add_argument("--ways", nargs="*", default=["dict", "exact", "near"])
    parser.add_argument("--pairs", type=int, default=20_000, help="rows of which all pairs are compared")
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--embeddings", type=int, default=200_000)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        job, *rest = given.child
        return print(json.dumps(stream(rest[0], int(rest[1])) if job == "stream" else semantic(int(rest[0]))))
    streams = []
    print(f"{'way':<10}{'rows':>12}{'rows/s':>12}{'B/sample':>10}{'peak':>8}{'wrong':>7}  found at distance")
    for rows in given.rows:
        for way in given.ways:
            told = in_child("stream", way, str(rows))
            streams.append(told)
            shown = {k: told["recall"][k] for k in ("-1", "0", "10", "19", "24", "28", "31") if k in told["recall"]}
            found = " ".join(f"{'bytes' if k == '-1' else k}:{v:.3f}" for k, v in shown.items())
            size = told.get("bytes_a_sample", "")
            print(
                f"{way:<10}{rows:>12,}{told['rows_per_second']:>12,}{size:>10}{told['peak_bytes_a_sample']:>8}"
                f"{told['wrong']:>7}  {found}",
                flush=True,
            )
    pairs = all_pairs(given.pairs)
    print(
        f"{'all pairs':<10}{given.pairs:>12,}{pairs['rows_per_second']:>12,}  and so many times fewer as rows are more"
    )
    seen = pictures(given.pictures)
    print(f"\n{'change':<16}{'median bits':>12}{'found at 31':>13}{'at 16':>8}")
    for kind, row in seen["changes"].items():
        print(f"{kind:<16}{row['median_distance']:>12}{row['found_31']:>13}{row['found_16']:>8}")
    print(f"named a wrong original: {seen['wrong']}\n")
    meaning = in_child("semantic", str(given.embeddings))
    print("semantic, min_cosine 0.96:", ", ".join(f"{name} {value}" for name, value in meaning.items()))
    print(
        json.dumps(
            {"benchmark": "deduplicate", "streams": streams, "all_pairs": pairs, "pictures": seen, "semantic": meaning}
        )
    )


if __name__ == "__main__":
    main()
