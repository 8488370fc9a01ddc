"""In which order the tests are dealt out to processes; the Makefile keeps each file in one, so that it makes its Ray cluster or
its trained models once. Property tests draw the same examples every time.
"""

from __future__ import annotations

import os
from itertools import zip_longest

import pytest
from hypothesis import settings

from tests.ray_heads import head, process_as_it_was, short_folder  # noqa: F401  fixtures

# Two processes test on two cores; and sums that are compared with those of a run elsewhere are taken in the same order.
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("same", derandomize=True)
settings.load_profile("same")

RAY = (  # which wait more than they work
    "test_train_on_ray",
    "test_slurm",
    "test_ray_cluster",
    "test_submit",
    "test_quarantine",
    "test_engine",
    "test_whole",
    "test_follow",
    "test_head",
    "test_jobs",
    "test_cli",
)
LONG = (
    "test_end_to_end",
    "test_killed_training",
    "test_train",
    "test_elastic",
    "test_validation",
    "test_loop",
    "test_lora",
    "test_memory",
    "test_fsdp",
    "test_object_storage",
    "test_clip_retrieval",
    "test_demo",
    "test_gpu",
)
FIRST = [name for pair in zip_longest(RAY, LONG) for name in pair if name]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, so that no process is left alone with one at the end, and by turns those that wait and that work."""
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))
