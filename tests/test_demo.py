"""What can go wrong with the demo itself ends in one line."""

from __future__ import annotations

import importlib
import socket
import sys
from pathlib import Path

import pytest

from examples.shapes import demo, recipe, server


@pytest.fixture(autouse=True)
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Whatever goes wrong here, nothing is done in build/demo."""
    monkeypatch.setenv("SHAPES_BUILD", str(tmp_path / "build"))
    importlib.reload(recipe)
    monkeypatch.setattr(demo, "densebridge", lambda *_: pytest.fail("went on"))
    return tmp_path / "build"


def said(monkeypatch: pytest.MonkeyPatch, *flags: str) -> str:
    monkeypatch.setattr(sys, "argv", ["demo", *flags])
    with pytest.raises(SystemExit) as ended:
        demo.main()
    assert isinstance(ended.value.code, str) and ended.value.code.startswith("densebridge: ")
    assert len(ended.value.code.splitlines()) == 1
    return ended.value.code


def test_a_taken_port(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind((server.HOST, 0))
        taken.listen()
        monkeypatch.setattr(server, "PORT", taken.getsockname()[1])
        assert f"port {server.PORT} is taken; stop what uses it" in said(monkeypatch, "--rows", "5")


def test_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "count must be at least 1, got 0" in said(monkeypatch, "--rows", "0")


def test_a_folder_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch, build: Path) -> None:
    build.write_text("a file")
    assert str(build) in said(monkeypatch, "--rows", "5")


def test_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "demo", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert "the same command goes on from there" in said(monkeypatch)
