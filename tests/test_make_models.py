"""The code that made the shipped weights still runs: two steps of every part give the same files, names and shapes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from examples.shapes import make_models
from examples.shapes.make_models import PARTS, WEIGHTS
from examples.shapes.making import base
from examples.shapes.making.captioner import make_captioner
from examples.shapes.making.clip import make_clip
from examples.shapes.making.language_model import make_language_model
from examples.shapes.making.vae import make_vae


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("making")
    out, scratch = folder / "out", folder / "scratch"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "POOL", 200)
        patch.setattr(base, "BATCH", 4)
        make_clip(out / "clip", steps=2, pool=50, batch=4)
        make_language_model(out / "language_model", steps=2, batch=4)
        make_captioner(out / "captioner", out / "clip", steps=2, pool=20, batch=4)
        make_vae(scratch / "vae", steps=2, batch=4)
        base.make_base(scratch / "base", out / "clip", first_steps=2, second_steps=4)
    make_models.make("assemble", out, scratch)
    return out


def test_the_same_files_come_out(made: Path) -> None:
    ours, shipped = ({str(p.relative_to(f)) for p in f.rglob("*") if p.is_file()} for f in (made, WEIGHTS))
    assert shipped - ours == {"README.md", "measured.json"} and not ours - shipped


def test_the_weights_have_the_shipped_shapes(made: Path) -> None:
    files = [p.relative_to(made) for p in made.rglob("*.safetensors")]
    assert len(files) == 6
    for file in files:
        ours, shipped = load_file(made / file), load_file(WEIGHTS / file)
        assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {k: (v.shape, v.dtype) for k, v in shipped.items()}
        assert all(bool(tensor.isfinite().all()) for tensor in ours.values())


def test_an_unknown_part_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["make_models", "lora"])
    with pytest.raises(SystemExit):
        make_models.main()
    assert f"there is no part 'lora': choose of {', '.join(PARTS)}" in capsys.readouterr().err
