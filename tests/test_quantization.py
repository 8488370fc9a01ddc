"""What transformers is told of 8 and 4 bits, and what a machine that cannot hold them says."""

from __future__ import annotations

import importlib.util
from typing import get_args

import pytest
import torch

from pipeline.quantization import Bits, quantization_of


def test_what_is_missing_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"^a\.b='8bit' needs bitsandbytes: pip install 'densebridge\[quantization\]'$"
    ):
        quantization_of("8bit", "float16", "a.b")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"^a\.b='4bit' needs a GPU: set it to 'none' on this machine$"):
        quantization_of("4bit", "float16", "a.b")


@pytest.mark.parametrize("bits", get_args(Bits))
def test_the_configuration(bits: Bits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.49.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    told = quantization_of(bits, "bfloat16", "a.b")
    if bits == "none":
        assert told is None
    else:
        assert (told.load_in_8bit, told.load_in_4bit) == (bits == "8bit", bits == "4bit")
        assert (told.bnb_4bit_quant_type, told.bnb_4bit_compute_dtype) == ("nf4", torch.bfloat16)
