"""Hidden states on disk: those that training would compute, and not before somebody has seen how much disk they take."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.captions import TokenizerConfig
from pipeline.plan import make_plan
from pipeline.runner import run_plan
from pipeline.stage import Stage, check_stages
from pipeline.storage import Folder
from stages.encode_features import EncodeFeatures, EncodeFeaturesConfig
from stages.ingest import ingest
from stages.pack import Pack, PackConfig
from tests.small_stages import SmallConfig, small_source
from tests.small_views import Facts
from tests.training_fixtures import LENGTH, WIDTH, language_model_config, make_language_model

TEXTS = ["red round big", "blue", "", "left " * 20]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    make_language_model(root / "models" / "t5")
    return root


def config_of(root: Path, **changes: Any) -> EncodeFeaturesConfig:
    model = str(root / "models" / "t5")
    t5 = TokenizerConfig(name="t5", model=model, max_length=LENGTH)
    return EncodeFeaturesConfig(
        **{"view": "v", "tokenizer": t5, "model": model, "width": WIDTH, "device": "cpu", **changes}
    )


def encode(config: EncodeFeaturesConfig, ids: list[Any]) -> dict[str, Any]:
    stage = EncodeFeatures(config)
    stage.load()
    columns = {"tokens_t5": pa.array(ids, pa.list_(pa.uint16())), "packed_image_v": pa.array([b""] * len(ids))}
    return dict(stage.process(pa.table(columns)))


@pytest.mark.parametrize("padding", ["fixed", "none"])
def test_features_are_those_of_training(root: Path, padding: str) -> None:
    model = language_model_config(root, padding="fixed" if padding == "fixed" else "longest").load()
    ids = model.tokenize(TEXTS)
    hidden, mask = model.encode(ids)
    found = encode(config_of(root, padding=padding), [ids[0], None, *ids[1:]])
    assert found["status"] == ["kept", "failed", *["kept"] * 3] and found["reason"][1] == "no_caption"
    stored = [np.load(io.BytesIO(data)) for data in found["features_v"] if data is not None]
    assert found["features_v"][1] is None and [len(one) for one in stored] == [
        n for n in found["features_v_length"] if n
    ]
    for one, states, real in zip(stored, hidden, mask, strict=True):
        expected = states if padding == "fixed" else states[real]
        assert one.dtype == np.float16 and one.shape == tuple(expected.shape)
        assert np.allclose(one, expected.numpy(), rtol=1e-3, atol=1e-3)


def test_overflow_is_told(root: Path, tmp_path: Path) -> None:
    model = language_model_config(root).load()
    with torch.no_grad():
        model.module.encoder.final_layer_norm.weight[0] = 1e6
    model.module.save_pretrained(tmp_path)
    found = encode(config_of(root, model=str(tmp_path)), model.tokenize(["red"]))
    assert (found["status"], found["reason"], found["features_v"]) == (["failed"], ["features_not_finite"], [None])


def test_too_much_is_refused_before_it_begins() -> None:
    t5 = TokenizerConfig(name="t5", model="google/flan-t5-xl")
    config = EncodeFeaturesConfig(view="512", tokenizer=t5, model="google/flan-t5-xl", width=2048)
    EncodeFeatures(config).check_rows(100_000)
    with pytest.raises(
        ValueError, match=r"34,000,000 samples, 512 KiB each, take up to 17,826 GB, and max_gigabytes is 100"
    ):
        EncodeFeatures(config).check_rows(34_000_000)
    EncodeFeatures(replace(config, force=True)).check_rows(34_000_000)
    EncodeFeatures(replace(config, max_gigabytes=20_000)).check_rows(34_000_000)


def test_settings_are_checked_and_named(root: Path) -> None:
    config = config_of(root)
    for change in ({"force": True}, {"batch_size": 2}, {"max_gigabytes": 1.0}):
        assert EncodeFeatures(replace(config, **change)).config_id == EncodeFeatures(config).config_id
    for change in ({"dtype": "float16"}, {"padding": "none"}, {"tokenizer": replace(config.tokenizer, max_length=4)}):
        assert EncodeFeatures(replace(config, **change)).config_id != EncodeFeatures(config).config_id
    facts = EncodeFeatures(config).view_facts["features"]
    assert (facts["width"], facts["tokens"]["max_length"], facts["tokenizer"]) == (WIDTH, LENGTH, "t5")
    with pytest.raises(ValueError, match="need a tokenizer with a max_length"):
        replace(config, tokenizer=replace(config.tokenizer, max_length="flexible"))
    with pytest.raises(ValueError, match="padding is 'all': choose one of fixed, none"):
        replace(config, padding="all")
    with pytest.raises(ValueError, match=r"width is 9, .* has 16"):
        EncodeFeatures(replace(config, width=9)).load()


def test_only_the_views_samples_are_encoded(root: Path, tmp_path: Path) -> None:
    config = config_of(root)
    packed = Pack(PackConfig(view="v", resolution=16, tokenizers=(config.tokenizer,), where="caption > '2'"))
    stages: list[Stage] = [Facts(SmallConfig()), packed, EncodeFeatures(config)]
    check_stages(stages)
    dataset = Folder(url=str(tmp_path / "data"))
    partitions = ingest(dataset, small_source(tmp_path, [str(n) for n in range(7)]))
    run_plan(dataset, stages, make_plan(dataset, stages, partitions), lambda _: None, runner="local")
    tables = [ticket.tables["encode_features_v"] for ticket in make_plan(dataset, stages, partitions).tickets]
    assert sum(table.rows for table in tables) == 4 and sum(table.kept for table in tables) == 4
