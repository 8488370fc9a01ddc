"""Ids: equal where and only where what they stand for is equal, and the same in every process."""

from __future__ import annotations

import enum
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.captions import TokenizerConfig, tokenizer_id
from pipeline.fingerprint import ID_LENGTH, digest_of, model_id, plain, settings_id
from pipeline.stage import Needs


class Kind(enum.Enum):
    ONE = "one"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Of everything that a configuration may hold."""

    number: float = 0.5
    names: tuple[str, ...] = ("a", "b")
    kind: Kind = Kind.ONE
    folder: Path = Path("a/b")
    table: dict[str, int] = field(default_factory=lambda: {"y": 1, "x": 2})
    inner: TokenizerConfig = TokenizerConfig(name="t5", model="m")
    needs: Needs = Needs()
    nothing: None = None


PARTS = st.lists(st.text(max_size=4) | st.binary(max_size=4), max_size=4)


@given(PARTS, PARTS)
def test_digests_are_equal_only_for_equal_parts(one: list[str | bytes], two: list[str | bytes]) -> None:
    as_bytes = [[p.encode() if isinstance(p, str) else p for p in parts] for parts in (one, two)]
    assert (digest_of(*one) == digest_of(*two)) == (as_bytes[0] == as_bytes[1])
    assert len(digest_of(*one)) == ID_LENGTH and set(digest_of(*one)) <= set("0123456789abcdef")


def test_digests_are_the_same_in_every_process() -> None:
    """A name in the dataset folder must mean the same for ever: this value may never change."""
    assert digest_of("ab", b"c") == "43ee655579de01ca"
    code = "from tests.test_fingerprint import Config, settings_id; print(settings_id(Config(), 3))"
    found = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[1],
        ).stdout.strip()
        for seed in ("1", "2")
    }  # fmt: skip
    assert found == {settings_id(Config(), 3)}


def test_what_changes_the_settings_changes_the_id() -> None:
    ids = {settings_id(Config(), 1), settings_id(Config(), 2)}
    changes = (
        {"number": 0.25},
        {"names": ("a",)},
        {"names": ("b", "a")},
        {"folder": Path("a/c")},
        {"table": {"x": 2, "y": 2}},
        {"inner": TokenizerConfig(name="t5", model="m", max_length=77)},
        {"needs": Needs(cpus=2.0)},
    )
    ids |= {settings_id(replace(Config(), **change), 1) for change in changes}  # type: ignore[arg-type]
    assert len(ids) == 2 + len(changes)
    assert settings_id(replace(Config(), table={"x": 2, "y": 1}), 1) == settings_id(Config(), 1)


def test_ignored_fields_do_not_count() -> None:
    other = replace(Config(), needs=Needs(gpus=1.0))
    assert settings_id(other, 1, ignore=("needs",)) == settings_id(Config(), 1, ignore=("needs",))
    assert "needs" not in plain(Config(), frozenset({"needs"})) and plain(Config())["kind"] == "one"


@pytest.mark.parametrize("value", [object(), {1, 2}, lambda: 0, b"bytes", PurePosixPath("a")])
def test_what_has_no_stable_text_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match="cannot be part of a configuration"):
        plain({"inside": [value]})


def test_a_model_is_its_files_not_its_place(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "unet").mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "unet" / "model.safetensors").write_bytes(b"weights")
        (tmp_path / name / "README.md").write_text(name)
    one, two = (model_id(str(tmp_path / n), None) for n in ("one", "two"))
    assert one == two
    (tmp_path / "two" / "unet" / "model.safetensors").write_bytes(b"others!")
    assert model_id(str(tmp_path / "two"), None) != one
    (tmp_path / "one" / "unet" / "model.safetensors").rename(tmp_path / "one" / "model.safetensors")
    assert model_id(str(tmp_path / "one"), None) != one


def test_a_model_on_the_hub_is_its_name_and_revision() -> None:
    assert model_id("google/flan-t5-xl", None) == tokenizer_id("google/flan-t5-xl", None) == "google/flan-t5-xl@main"
    assert model_id("google/flan-t5-xl", "abc") == tokenizer_id("google/flan-t5-xl", "abc") == "google/flan-t5-xl@abc"


def test_a_tokenizer_is_its_own_files_only(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no tokenizer"):
        tokenizer_id(str(tmp_path), None)
    (tmp_path / "tokenizer.json").write_text("{}")
    before = tokenizer_id(str(tmp_path), None)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert tokenizer_id(str(tmp_path), None) == before
    (tmp_path / "tokenizer.json").write_text("{ }")
    assert tokenizer_id(str(tmp_path), None) != before


def test_what_a_model_is_asked_and_how_it_is_cut_count(tmp_path: Path) -> None:
    """A chat template is a file of its own since transformers 4.50, and a sentencepiece model may be all there is."""
    (tmp_path / "tokenizer_config.json").write_text("{}")
    before = model_id(str(tmp_path), None), tokenizer_id(str(tmp_path), None)
    (tmp_path / "chat_template.jinja").write_text("USER: {{ text }}")
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    assert tokenizer_id(str(tmp_path), None) != before[1]
    (tmp_path / "tokenizer.model").unlink()
    assert model_id(str(tmp_path), None) != before[0]
