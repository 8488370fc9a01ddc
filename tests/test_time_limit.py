"""Calls that end, fail, or take too long."""

from __future__ import annotations

import threading

import pytest

from pipeline.time_limit import within


def test_a_call_s_result_its_error_and_its_lateness() -> None:
    assert within(60, lambda: "an answer", "late") == "an answer"
    with pytest.raises(ZeroDivisionError):
        within(60, lambda: 1 / 0, "late")
    never = threading.Event()
    with pytest.raises(TimeoutError, match="nobody answers"):
        within(0.05, lambda: never.wait(60), "nobody answers")
    never.set()
