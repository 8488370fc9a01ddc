"""Language models as build and training run them: the encoder alone, cast whole, pads hidden or seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.text_models import hidden_states, load_text_model, width_of
from tests.training_fixtures import WIDTH, make_language_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_language_model(tmp_path_factory.mktemp("t5")))


def test_models_are_frozen_and_cast_whole(folder: str) -> None:
    module = load_text_model(folder, None, "", "bfloat16")
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16} and width_of(module) == WIDTH
    assert not module.training and not any(p.requires_grad for p in module.parameters())


def test_hidden_pads_change_nothing_and_seen_ones_do(folder: str) -> None:
    module = load_text_model(folder, None, "", "float32")
    ids = [np.array([3, 4, 1], np.uint16), np.array([5, 1], np.uint16)]
    short, mask = hidden_states(module, ids, length=3, pad=0, pads="hidden")
    long, _ = hidden_states(module, ids, length=8, pad=0, pads="hidden")
    assert mask.tolist() == [[True] * 3, [True, True, False]]
    assert torch.allclose(short[mask], long[:, :3][mask], atol=1e-5)
    seen, everything = hidden_states(module, ids, length=8, pad=0, pads="seen")
    assert bool(everything.all()) and not torch.allclose(seen[1, :2], long[1, :2], atol=1e-5)


def test_a_model_with_another_decoder_is_refused(tmp_path: Path) -> None:
    from transformers import BartConfig

    BartConfig(vocab_size=8, d_model=8, encoder_layers=1, decoder_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a bart with a decoder: save its encoder alone and name that folder"):
        load_text_model(str(tmp_path), None, "", "float32")
