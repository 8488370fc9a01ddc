"""Encoding ahead: the same batches in the same order, on another stream, handed over once they are there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.storage import Folder
from tests.training_fixtures import make_world, training_config
from training import encoding
from training.batches import Batch, Batches
from training.bridge import Conditioning
from training.configuration import LoRAConfig, SpeedConfig
from training.connectors import QueriesConfig
from training.encoding import Encoded, Encoder, encode, encodes_ahead
from training.loop import start_processes
from training.parts import Parts, batch_config, load_parts
from training.views import open_views


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def parts(world: Path) -> Parts:
    config = training_config(world)
    return load_parts(config, start_processes(config))


@pytest.fixture
def batches(world: Path, parts: Parts) -> Iterator[Batches]:
    config = training_config(world)
    view = open_views(config, Folder(url=str(world / "dataset")))[0]
    with Batches(view, batch_config(config, 0, parts)) as found:
        yield found


def taken(encoder: Encoder, count: int) -> list[Encoded]:
    """As the step takes them: ahead after each."""
    found = []
    for _ in range(count):
        found.append(next(encoder))
        encoder.look_ahead()
    return found


def test_ahead_gives_the_same_in_the_same_order(parts: Parts, batches: Batches) -> None:
    given = [next(batches) for _ in range(5)]
    expected = [encode(parts, batch, "3/0") for batch in given]
    for ahead in (False, True):
        found = taken(Encoder(parts, iter(given), "3/0", ahead=ahead), 4)
        assert [one.slots.positions for one in found] == [one.slots.positions for one in expected[:4]]
        for one, other in zip(found, expected, strict=False):
            assert all(torch.equal(a, b) for a, b in zip(one.tensors(), other.tensors(), strict=True))


def test_the_next_is_begun_on_the_side_and_awaited_by_who_takes_it(
    parts: Parts, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    main = torch.cpu.current_stream()

    def tell(parts: Parts, batch: Batch, draws: str) -> Encoded:
        done.append("main" if torch.cpu.current_stream() is main else "side")
        return encode(parts, batch, draws)

    def tells(name: str) -> Any:
        return lambda stream, *_: done.append(f"{name} by {'main' if stream is main else 'side'}")

    monkeypatch.setattr(encoding, "encode", tell)
    monkeypatch.setattr(torch.cpu.Stream, "wait_stream", tells("waited for"))
    monkeypatch.setattr(torch.cpu.Stream, "wait_event", tells("let begin"))
    monkeypatch.setattr(torch.cpu.Event, "record", lambda *_: done.append("marked"))
    encoder = Encoder(parts, batches, "3/0", ahead=True)
    next(encoder)
    first = ["marked", "let begin by side", "side", "waited for by main", "marked"]
    assert done == first
    encoder.look_ahead()
    encoder.look_ahead()  # one is enough
    assert done[5:] == ["let begin by side", "side"]
    next(encoder)
    assert done[7:] == ["waited for by main", "marked"]


def test_all_that_lies_on_the_device_is_known(parts: Parts, batches: Batches) -> None:
    one = encode(parts, next(batches), "3/0")
    assert len(one.tensors()) == 8  # seven of its own and the slots'
    beside = Conditioning(torch.zeros(6, 2, 3), torch.ones(6, 2, dtype=torch.bool))
    assert len(replace(one, beside=beside).tensors()) == 10


def test_nothing_is_encoded_ahead_that_waits_for_the_step(world: Path, parts: Parts, monkeypatch: Any) -> None:
    config = training_config(world)
    assert not encodes_ahead(config, parts)  # no GPU
    on_gpu = type("Accelerator", (), {"device": torch.device("cuda")})()
    frozen = replace(parts, accelerator=on_gpu)
    assert encodes_ahead(config, frozen)
    assert not encodes_ahead(replace(config, speed=SpeedConfig(encode_ahead=False)), frozen)
    lora = LoRAConfig(targets=(r".*SelfAttention\.[qv]",), rank=2)
    adapted = replace(config, language_model=replace(config.language_model, lora=lora))
    queries = replace(config, connector=QueriesConfig(in_width=16, width=16, queries=4, blocks=1, heads=2))
    for trained in (adapted, queries):
        found = load_parts(trained, start_processes(trained))
        assert not encodes_ahead(trained, replace(found, accelerator=on_gpu))
