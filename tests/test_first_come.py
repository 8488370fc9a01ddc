"""First come stays: held against the plainest way to say it, row by row, however the rows are cut into batches."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.sample import sample_key
from stages import first_come, near
from stages.first_come import FirstCome, Forbidden
from stages.near import Banding, Index, Signatures

NEAR = 7
KINDS = {
    "same": lambda: Index(words=2, near=0, banding=Banding(bands=1, bits=64, flips=0)),
    "close": lambda: Index(words=1, near=NEAR, banding=Banding(bands=4, bits=16)),  # finds all up to 7
}
Row = tuple[int, int | None, bool]
"""Digest, hash (None: there is none), whether it is listed."""
rows_strategy = st.lists(
    st.tuples(st.integers(0, 30), st.none() | st.integers(0, 2**10 - 1), st.sampled_from([True, True, False])),
    min_size=1,
    max_size=60,
)


def kinds_of(rows: list[Row]) -> list[Signatures]:
    digests = np.array([[d // 2, d] for d, _, _ in rows], np.uint64).reshape(
        -1, 2
    )  # the first word alone is not enough
    hashes = [0 if h is None else sum((h >> bit & 1) << 6 * bit for bit in range(10)) for _, h, _ in rows]
    told = np.array([h is not None for _, h, _ in rows], bool)
    return [
        Signatures(words=digests, valid=np.ones(len(rows), bool)),
        Signatures(words=np.array(hashes, np.uint64).reshape(-1, 1), valid=told),
    ]


def judge(judges: FirstCome, rows: list[Row], start: int = 0, bad: tuple[int, ...] = ()) -> list[tuple]:
    table = pa.table(
        {
            "key": [sample_key(str(start + n)) for n in range(len(rows))],
            "listed": pa.array([listed for _, _, listed in rows], pa.bool_()),
        }
    )
    found = judges.judge(table, kinds_of(rows), {"bad": np.isin(np.arange(len(rows)), bad)})
    columns = found.columns
    assert all((s == "kept") == (r is None) for s, r in zip(columns["status"], columns["reason"]))
    return list(zip(columns["reason"], columns["duplicate_of"], found.distance))


def plainly(rows: list[Row]) -> list[tuple]:
    """What the rule says, one row after another."""
    stayed: dict[bool, list[int]] = {True: [], False: []}
    ends: list[tuple] = []
    for spot, (digest, told, listed) in enumerate(rows):
        best = None
        for group in (True,) if listed else (True, False):
            likes = []
            for other in stayed[group]:
                if rows[other][0] == digest:
                    likes.append((0, 0, other))
                elif told is not None and rows[other][1] is not None:
                    distance = (told ^ rows[other][1]).bit_count()
                    likes += [(1, distance, other)] if distance <= NEAR else []
            best = best or min(likes, default=None)
        if best is None:
            stayed[listed].append(spot)
        ends.append((None, None, None) if best is None else (list(KINDS)[best[0]], sample_key(str(best[2])), best[1]))
    return ends


@given(rows_strategy, st.lists(st.integers(0, 60), max_size=4), st.integers(1, 9))
@settings(max_examples=150, deadline=None)
def test_it_is_the_plain_rule_however_the_rows_are_cut(rows: list[Row], cuts: list[int], block: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(first_come, "_BLOCK", block)
        judges = FirstCome(KINDS)
        spots = [0, *sorted(min(c, len(rows)) for c in cuts), len(rows)]
        found = [end for a, b in pairwise(spots) for end in judge(judges, rows[a:b], a)]
    assert found == plainly(rows)


def test_many_rows_of_which_many_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks, tables that grow and are linked anew in pieces, and one block that is all but one picture."""
    monkeypatch.setattr(near, "_LINKED", 100)
    rng = np.random.default_rng(3)
    rows = [
        (int(d), int(h) if q else None, bool(u))
        for d, h, q, u in zip(
            rng.integers(0, 900, 1500), rng.integers(0, 2**10, 1500), rng.random(1500) < 0.2, rng.random(1500) < 0.8
        )
    ]
    rows += [(1000 + n, 5, True) for n in range(600)]
    judges = FirstCome(KINDS)
    assert judge(judges, rows) == plainly(rows)
    assert judges.crowded == 0 < judges.bytes < 200_000


def test_what_cannot_be_judged_stands_aside() -> None:
    rows: list[Row] = [(1, 1, True)] * 3
    assert judge(FirstCome(KINDS), rows, bad=(0,)) == [
        ("bad", None, None), (None, None, None), ("same", sample_key("1"), 0)
    ]  # fmt: skip


def test_what_is_like_something_forbidden_is_nobodys_original() -> None:
    items = kinds_of([(5, 0b1111100000, True)])
    judges = FirstCome(KINDS, Forbidden(["five"], [make() for make in KINDS.values()], items))
    rows: list[Row] = [(5, None, True), (6, 0b1111100011, True), (6, 0, True), (7, 0b11, True)]
    assert judge(judges, rows) == [
        ("near_evaluation", None, 0), ("near_evaluation", None, 2), ("near_evaluation", None, 5),
        ("near_evaluation", None, 7),
    ]  # fmt: skip
    far = judges.judge(pa.table({"key": [sample_key("x")], "listed": [True]}), kinds_of([(8, 0b0000011111, True)]), {})
    assert far.columns["status"] == ["kept"] and far.columns["evaluation_item"] == [None]


def test_a_key_that_is_none_is_an_error() -> None:
    with pytest.raises(ValueError, match="abc is no key"):
        FirstCome(KINDS).judge(pa.table({"key": ["abc"], "listed": [True]}), kinds_of([(1, 1, True)]), {})
