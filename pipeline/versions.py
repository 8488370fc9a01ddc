"""Which code runs: its commit, and the versions of what it stands on."""

from __future__ import annotations

import os
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "densebridge",
    "torch",
    "transformers",
    "diffusers",
    "accelerate",
    "ray",
    "webdataset",
    "pyarrow",
    "img2dataset",
)


def commit() -> str | None:
    """The commit of the code that runs, with `+` where files were changed since; None outside a repository.

    On a cluster the code is a copy without its history, so `densebridge submit` says it in the environment.
    """
    if told := os.environ.get("DENSEBRIDGE_COMMIT"):
        return told
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def versions() -> dict[str, str]:
    """By package, of those that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
