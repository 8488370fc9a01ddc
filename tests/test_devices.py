"""A model runs where it is told to, or on the GPU where there is one."""

from __future__ import annotations

import pytest
import torch

from pipeline.devices import device_of, sent


def test_a_named_device_is_taken_and_auto_finds_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, found in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert device_of("auto") == found and device_of("cuda:1") == "cuda:1"


def test_on_the_processor_a_tensor_stays_where_it_is() -> None:
    tensor = torch.ones(3)
    assert sent(tensor, torch.device("cpu")) is tensor
