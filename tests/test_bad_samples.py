"""How many samples in a row could not be used, over the edges of steps."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from training.bad_samples import bad_run


@given(
    bad=st.sets(st.integers(0, 39)),
    edges=st.lists(st.integers(1, 10), min_size=1, max_size=5),
    before=st.integers(0, 3),
)
def test_runs_are_the_same_in_whatever_steps(bad: set[int], edges: list[int], before: int) -> None:
    start, longest, run = 0, before, before
    for length in edges:
        found, run = bad_run({p for p in bad if start <= p < start + length}, range(start, start + length), run)
        longest, start = max(longest, found), start + length
    assert (longest, run) == bad_run({p for p in bad if p < start}, range(start), before)
