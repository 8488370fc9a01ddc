"""In which order the tests are dealt out to processes; the Makefile keeps each file in one, so that it makes its Ray cluster or
its trained models once. Property tests draw the same examples every time.
"""

from __future__ import annotations

import pytest
from hypothesis import settings

from tests.ray_heads import head, process_as_it_was, short_folder  # noqa: F401  fixtures

settings.register_profile("same", derandomize=True)
settings.load_profile("same")

RAY = (
    "test_cli",
    "test_engine",
    "test_follow",
    "test_head",
    "test_jobs",
    "test_quarantine",
    "test_ray_cluster",
    "test_slurm",
    "test_submit",
    "test_train_on_ray",
    "test_whole",
)
LONG = (
    "test_elastic",
    "test_killed_training",
    "test_clip_retrieval",
    "test_fsdp",
    "test_demo",
    "test_end_to_end",
    "test_loop",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, so that no process is left alone with one at the end."""
    items.sort(key=lambda item: item.path.stem not in RAY + LONG)
