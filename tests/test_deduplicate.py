"""Duplicates by bytes and by perceptual hash: which goes, which stays, and which evaluation picture was met."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.picture_variants import VARIANTS, jpeg, natural_picture
from pipeline.plan import make_plan
from pipeline.runner import run_plan
from pipeline.sample import sample_key
from pipeline.stage import Columns, Stage
from pipeline.storage import Folder
from pipeline.tables import read_table
from stages.deduplicate import Deduplicate, DeduplicateConfig
from stages.evaluation_set import pdq_of
from stages.ingest import ingest
from stages.near import Banding
from tests.small_stages import Small, SmallConfig, small_source


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def stage(**settings: Any) -> Deduplicate:
    made = Deduplicate(DeduplicateConfig(**settings))
    made.load()
    return made


def run(
    made: Deduplicate, names: str | list[str], digests: list[str], listed: list[bool] | None = None, **more: Any
) -> list[tuple]:
    """(reason, name of the original, distance) of each row; names become keys."""
    known = {sample_key(n): n for n in (*names, *map(chr, range(128)))}
    table = {"key": [sample_key(n) for n in names], "sha256": digests, "listed": listed or [True] * len(names)}
    columns = made.process(pa.table({**table, **{name: pa.array(values) for name, values in more.items()}}))
    assert set(columns) == {*made.writes.names, "status", "reason"}
    assert all(len(values) == len(names) for values in columns.values())
    assert [s == "kept" for s in columns["status"]] == [r is None for r in columns["reason"]]
    return [
        (reason, known.get(key, key), distance)
        for reason, key, distance in zip(columns["reason"], columns["duplicate_of"], columns["distance"])
    ]


def test_the_first_stays_over_all_batches() -> None:
    made = stage()
    digests = [sha(c) for c in "abacba"]
    flat = [*run(made, "uvw", digests[:3]), *run(made, "xyz", digests[3:])]
    first, again = (None, None, None), lambda name: ("duplicate", name, 0)
    assert flat == [first, first, again("u"), first, again("v"), again("u")]
    assert made.ordered and made.reads == ("sha256", "listed")


def test_what_the_source_no_longer_lists_is_nobodys_original() -> None:
    """A picture under two URLs of which the first leaves the list stays, by the second."""
    found = run(stage(), "uvwx", [sha("a")] * 4, [False, False, True, True])
    assert [original for _, original, _ in found] == [None, "u", None, "w"]
    mixed = run(stage(), "uvwx", [sha("a")] * 4, [False, True, False, True])
    assert [original for _, original, _ in mixed] == [None, None, "v", "v"]


def test_digests_that_share_a_beginning_are_told_apart() -> None:
    shared = "0" * 16
    digests = [shared + c * 48 for c in "aba"]
    assert [original for _, original, _ in run(stage(), "uvw", digests)] == [None, None, "u"]


def test_values_that_are_none_have_a_reason() -> None:
    hashes = [bytes(32), b"short", None, bytes(32), bytes(32)]
    quality = [100, 100, None, 49, None]
    more = {"pdq": pa.array(hashes, pa.binary()), "pdq_quality": pa.array(quality, pa.int16())}
    found = run(stage(near=31), "uvwxy", [sha("a"), sha("b"), "not hex", sha("d"), sha("e")], **more)
    assert [reason for reason, _, _ in found] == [None, "bad_pdq", "bad_sha256", None, None]
    dull = run(stage(near=31), "uv", [sha("c"), sha("c")], pdq=[None, b"1" * 32], pdq_quality=[None, 9])
    assert [reason for reason, _, _ in dull] == [None, "duplicate"]


HASHES = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 22)), min_size=1, max_size=25)


@given(HASHES, st.lists(st.integers(0, 25), max_size=3), st.integers(0, 19))
@settings(max_examples=60, deadline=None)
def test_near_ones_up_to_the_bound_are_all_found(rows: list[tuple[int, int]], cuts: list[int], near: int) -> None:
    """However the rows are cut, and if the stage is started anew and lives through what was before."""
    rng = np.random.default_rng(0)
    bases = rng.integers(0, 256, (6, 32), np.uint8)
    places = rng.permutation(256)[:22]

    def hash_of(base: int, flips: int) -> bytes:
        bits = np.unpackbits(bases[base])
        bits[places[:flips]] ^= 1
        return np.packbits(bits).tobytes()

    hashes = [hash_of(*row) for row in rows]
    stayed: list[int] = []
    expected: list[tuple] = []
    for spot, value in enumerate(hashes):
        distances = [(_distance(value, hashes[other]), other) for other in stayed]
        best = min((d for d in distances if d[0] <= near), default=None)
        expected.append(("near_duplicate", str(best[1]), best[0]) if best else (None, None, None))
        if best is None:
            stayed.append(spot)

    def part(made: Deduplicate, start: int, end: int) -> list[tuple]:
        names = [str(n) for n in range(start, end)]
        more = {"pdq": pa.array(hashes[start:end], pa.binary()), "pdq_quality": pa.array([80] * len(names), pa.int16())}
        known = {sample_key(str(n)): str(n) for n in range(len(rows))}
        found = run(made, names, [sha(n) for n in names], **more)
        return [(reason, known.get(key, key), distance) for reason, key, distance in found]

    spots = [0, *sorted(min(c, len(rows)) for c in cuts), len(rows)]
    made = stage(near=near)
    assert [end for a, b in pairwise(spots) for end in part(made, a, b)] == expected
    anew = stage(near=near)
    part(anew, 0, spots[1])
    assert part(anew, spots[1], len(rows)) == expected[spots[1] :]


def _distance(one: bytes, other: bytes) -> int:
    return (int.from_bytes(one, "big") ^ int.from_bytes(other, "big")).bit_count()


ALWAYS_FOUND = ("jpeg 50", "jpeg 20", "double size", "10 % higher", "contrast 0.7", "grey")


def test_pictures_made_anew_are_found_and_others_are_not() -> None:
    """Real files and real hashes; what PDQ takes for another picture (mirrored, much cropped) stays."""
    rng = np.random.default_rng(5)
    originals = [natural_picture(rng) for _ in range(12)]
    names, files = [], []
    for kind, vary in {"original": jpeg, **VARIANTS}.items():
        names += [f"{kind} {n}" for n in range(len(originals))]
        files += [vary(picture) for picture in originals]
    hashes, quality = zip(*map(pdq_of, files))
    more = {"pdq": pa.array(hashes, pa.binary()), "pdq_quality": pa.array(quality, pa.int16())}
    digests = [hashlib.sha256(file).hexdigest() for file in files]
    found = dict(zip(names, run(stage(near=31), names, digests, **more)))
    for kind in ("original", "5 % cropped", "mirrored"):
        assert all(found[f"{kind} {n}"][0] is None for n in range(12))
    for name, (reason, original, distance) in found.items():
        kind, number = name.rsplit(" ", 1)
        if reason:
            assert reason == "near_duplicate" and original.rsplit(" ", 1)[1] == number and 0 <= distance <= 31
        assert reason or kind not in ALWAYS_FOUND
    careful = dict(zip(names, run(stage(near=10), names, digests, **more)))
    assert sum(reason is not None for reason, _, _ in careful.values()) < sum(
        r is not None for r, _, _ in found.values()
    )


def test_pictures_of_an_evaluation_set_are_taken_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    held, other = natural_picture(rng), natural_picture(rng)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "held.jpg").write_bytes(jpeg(held))
    files = [jpeg(held), jpeg(held, 40), jpeg(other), jpeg(other, 40)]
    hashes, quality = zip(*map(pdq_of, files))
    digests = [hashlib.sha256(file).hexdigest() for file in files]
    more = {"pdq": pa.array(hashes, pa.binary()), "pdq_quality": pa.array(quality, pa.int16())}
    path = str(tmp_path / "set")
    exact = run(stage(evaluation=path), "uvwx", digests)
    assert [reason for reason, _, _ in exact] == ["near_evaluation", None, None, None]
    near = stage(evaluation=path, near=31)
    assert [(r, o) for r, o, _ in run(near, "uvwx", digests, **more)] == [
        ("near_evaluation", None), ("near_evaluation", None), (None, None), ("near_duplicate", "w")
    ]  # fmt: skip
    table = pa.table({"key": [sample_key("y")], "sha256": digests[:1], "listed": [True]})
    columns = stage(evaluation=path).process(table)
    assert columns["evaluation_item"] == ["held.jpg"] and columns["status"] == ["dropped"]

    pq.write_table(pa.table({"pdq": pa.array(hashes[:1], pa.binary())}), tmp_path / "set.parquet")
    reasons = [r for r, _, _ in run(stage(evaluation=f"{path}.parquet", near=31), "uvwx", digests, **more)]
    assert reasons == ["near_evaluation", "near_evaluation", None, "near_duplicate"]
    with pytest.raises(ValueError, match="has no sha256, by which pictures are compared"):
        stage(evaluation=f"{path}.parquet")


class Camera(Small):
    """Pictures by the number in the URL: each in five versions whose hashes differ in a few bits."""

    name = "download"
    reads = ("url",)
    writes = pa.schema([("sha256", pa.string()), ("pdq", pa.binary()), ("pdq_quality", pa.int16())])

    def process(self, batch: pa.Table) -> Columns:
        numbers = [int(url.rsplit("/", 1)[1]) for url in batch.column("url").to_pylist()]
        hashes = []
        for number in numbers:
            bits = np.unpackbits(np.random.default_rng(number // 5).integers(0, 256, 32, np.uint8))
            bits[: 3 * (number % 5)] ^= 1
            hashes.append(np.packbits(bits).tobytes())
        return {"sha256": [sha(str(n)) for n in numbers], "pdq": hashes, "pdq_quality": [90] * len(numbers)}


def test_a_build_that_goes_on_ends_like_one_from_nothing(tmp_path: Path) -> None:
    """With more rows at each go, and a stage that must be shown what came before; then a list that changes no verdict."""
    numbers = np.random.default_rng(0).permutation(120)
    urls = [f"http://x/{n}" for n in numbers]
    stages: list[Stage] = [Camera(SmallConfig()), Deduplicate(DeduplicateConfig(near=6))]

    def ends(dataset: Folder, *lists: list[str], build_each: bool) -> dict[str, tuple]:
        for listed in lists:
            partitions = ingest(dataset, small_source(tmp_path, listed, 16))
            if build_each or listed is lists[-1]:
                plan = make_plan(dataset, stages, partitions)
                run_plan(dataset, stages, plan, lambda _: None, runner="local")
        tickets = make_plan(dataset, stages, partitions).tickets
        rows = [r for t in tickets for r in read_table(dataset, t.tables["deduplicate"]).to_pylist()]
        return {r["key"]: (r["status"], r["reason"], r["duplicate_of"], r["distance"]) for r in rows}

    lists = urls[:40], urls[:90], urls, urls[30:]
    found = ends(Folder(url=str(tmp_path / "grown")), *lists, build_each=True)
    assert found == ends(Folder(url=str(tmp_path / "at_once")), *lists, build_each=False)
    assert sum(reason == "near_duplicate" for _, reason, _, _ in found.values()) > 40


def test_what_changes_the_result_changes_its_name(tmp_path: Path) -> None:
    pq.write_table(pa.table({"sha256": [sha("a")]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"sha256": [sha("b")]}), tmp_path / "b.parquet")
    kinds: list[dict[str, Any]] = [
        {}, {"near": 31}, {"near": 16}, {"near": 16, "banding": Banding(bands=8)},
        {"evaluation": str(tmp_path / "a.parquet")}, {"evaluation": str(tmp_path / "b.parquet")},
    ]  # fmt: skip
    ids = [Deduplicate(DeduplicateConfig(**kind)).config_id for kind in kinds]
    assert len(set(ids)) == len(ids) and Deduplicate(DeduplicateConfig(batch_size=9)).config_id == ids[0]
    (tmp_path / "c.parquet").write_bytes((tmp_path / "a.parquet").read_bytes())
    assert Deduplicate(DeduplicateConfig(evaluation=str(tmp_path / "c.parquet"))).config_id == ids[4]


@pytest.mark.parametrize("wrong", ({"near": 65}, {"min_quality": 101}, {"banding": Banding(bands=11)}), ids=str)
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DeduplicateConfig(**wrong)
