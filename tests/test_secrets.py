"""A file of secrets: what it may look like, and that no message shows a value."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.secrets import VARIABLE, read_secrets

names = st.from_regex(r"SMALL_[A-Z0-9_]{1,8}", fullmatch=True)
values = st.text(st.characters(codec="ascii", min_codepoint=33, max_codepoint=126), min_size=1).filter(
    lambda value: value[0] not in "'\""
)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "secrets.env"
    monkeypatch.setattr(os, "environ", {**os.environ, VARIABLE: str(path)})
    return path


def write(path: Path, text: str | bytes, mode: int = 0o600) -> None:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(mode)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(st.dictionaries(names, values, max_size=5))
def test_values_are_taken_as_they_stand(file: Path, secrets: dict[str, str]) -> None:
    write(file, "# of the hub\n\n" + "".join(f"{name}={value}\n" for name, value in secrets.items()))
    read_secrets()
    assert {name: os.environ[name] for name in secrets} == secrets


def test_without_a_file_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    before = dict(os.environ)
    read_secrets()
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A=1\nhf_value\n", "line 2: this is not NAME=VALUE"),
        ("2A=hf_value\n", "line 1: this is not"),
        ("A = hf_value\n", "line 1: this is not"),
        ("A=\n", "line 1: this is not"),
        ('A="hf_value"\n', "line 1: A is in quotes"),
        (b"A=hf_value\xff\n", "are no UTF-8 text"),
        ("A=hf_value\0\n", "line 1: this is not"),
    ],
)
def test_a_wrong_line_is_named_and_not_shown(file: Path, text: str | bytes, message: str) -> None:
    write(file, text)
    with pytest.raises(ValueError, match=message) as caught:
        read_secrets()
    assert "hf_value" not in str(caught.value) and "A" not in os.environ


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_is_refused(file: Path, mode: int) -> None:
    write(file, "A=hf_value\n", mode)
    with pytest.raises(PermissionError, match="may be written by others than its owner: chmod go-w"):
        read_secrets()
    assert "A" not in os.environ


def test_a_file_that_others_may_read_is_taken(file: Path) -> None:
    """As Kubernetes mounts them."""
    write(file, "SMALL_A=1\n", 0o644)
    read_secrets()
    assert os.environ["SMALL_A"] == "1"


def test_a_missing_file_is_named(file: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"no secrets at {file}: {VARIABLE} names a file"):
        read_secrets()
