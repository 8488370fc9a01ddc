"""What a run says of the code that made it."""

from __future__ import annotations

import re
import subprocess

import pytest
import torch

from pipeline.versions import commit, versions


def test_the_environment_goes_before_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DENSEBRIDGE_COMMIT", "abc123+")
    assert commit() == "abc123+"


def test_a_repository_gives_its_commit_and_nothing_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DENSEBRIDGE_COMMIT", raising=False)
    found = commit()
    assert found is None or re.fullmatch(r"[0-9a-f]{7,40}\+?", found)

    def fails(*_: object, **__: object) -> None:
        raise subprocess.CalledProcessError(128, "git")

    monkeypatch.setattr(subprocess, "run", fails)
    assert commit() is None


def test_versions_are_of_what_is_installed() -> None:
    assert versions()["torch"] == torch.__version__
