"""How the tests are dealt out to processes: a file stays together, and so do all files that start Ray clusters, which would
starve each other.
"""

from __future__ import annotations

import pytest

RAY = ("test_cli", "test_engine", "test_quarantine", "test_submit", "test_whole")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Groups for pytest-xdist, which the Makefile starts with two processes; without it they mean nothing."""
    for item in items:
        name = item.path.stem
        item.add_marker(pytest.mark.xdist_group("ray" if name in RAY else name))
