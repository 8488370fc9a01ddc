"""Opt-outs: where answers say them, whom they address, and what a policy makes of what was recorded."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from stages.opt_out import HEEDED, KNOWN, header_directives, preference, refused_by


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        ([("x-robots-tag", "noai, noimageai")], {"noai", "noimageai"}),
        ([("X-Robots-Tag", "noai"), ("X-Robots-Tag", "otherbot: noindex")], {"noai"}),
        ([("X-Robots-Tag", "unavailable_after: 25 Jun 2030 15:00:00 PST, noml")], {"noml"}),
        ([("X-Robots-Tag", "densebridge: none")], {"noindex"}),
        ([("X-Robots-Tag", "robots-disallow-not, anything, ")], set()),
        ([("TDM-Reservation", "1")], {"tdm-reservation"}),
        ([("TDM-Reservation", "0")], set()),
        ([("Content-Signal", "search=yes, AI-Train=No")], {"ai-train=no"}),
        ([("Content-Signal", "ai-train=yes")], set()),
        ([("Content-Usage", "train-ai=n;x=1, search=y")], {"train-ai=n"}),
        ([("Content-Usage", "search=n"), ("Content-Usage", "train-ai=n")], {"train-ai=n"}),
        ([("Content-Type", "noai")], set()),
    ],
)
def test_headers_say(headers: list[tuple[str, str]], found: set[str]) -> None:
    assert header_directives(CIMultiDict(headers), "densebridge") == found


@pytest.mark.parametrize(
    ("text", "said"),
    [("ai-train=no", True), ("ai-train = yes", False), ("search=no", None), ("ai-train", None), ("ai-train=", None)],
)
def test_a_preference_is_said_denied_or_not_given(text: str, said: bool | None) -> None:
    assert preference(text, "ai-train=no") is said


@given(st.sets(st.sampled_from(KNOWN)), st.sets(st.sampled_from(KNOWN)))
def test_a_policy_is_held_against_what_was_recorded(seen: set[str], policy: set[str]) -> None:
    assert refused_by(",".join(sorted(seen)), policy) == bool(seen & policy)


@given(st.lists(st.text(alphabet="abNnoAIi:,;=-\t é", max_size=40)))
def test_whatever_headers_say_only_known_words_are_recorded(values: list[str]) -> None:
    headers = CIMultiDict([(name, v) for v in values for name in ("X-Robots-Tag", "Content-Signal", "Content-Usage")])
    assert header_directives(headers, "a") <= {*KNOWN}


def test_words_can_be_recorded_side_by_side() -> None:
    assert {*HEEDED} < {*KNOWN} and not any("," in word or word != word.strip().lower() for word in KNOWN)
