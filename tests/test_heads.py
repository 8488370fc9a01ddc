"""Heads over embeddings: any chain of linear layers computes what torch computes, and what is none is refused in one line."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pipeline.stage import check_stages
from stages.embed import Embed, EmbedConfig
from stages.heads import HeadConfig, Heads, HeadsConfig
from tests.small_stages import Small, SmallConfig


class Aesthetic(nn.Module):
    """The layout of LAION's aesthetic predictor V2: `layers.0` … `layers.7`, nothing between them when it does not train."""

    def __init__(self, width: int = 768, activation: type[nn.Module] = nn.Identity) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for after in (1024, 128, 64, 16):
            drop = nn.Dropout(0.2 if after > 64 else 0.1) if after > 16 else activation()
            parts += [nn.Linear(width, after), *([activation()] if activation is nn.ReLU and after > 16 else []), drop]
            width = after
        self.layers = nn.Sequential(*parts, nn.Linear(width, 1))
        if activation is nn.Identity:
            del self.layers[7]  # there is no dropout before the last layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def unit(count: int, width: int) -> np.ndarray:
    vectors = np.random.default_rng(0).normal(size=(count, width)).astype(np.float32)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def run_heads(embeddings: np.ndarray, *heads: HeadConfig) -> dict[str, np.ndarray]:
    stage = Heads(HeadsConfig(model="clip", heads=heads))
    stage.load()
    made = stage.process(pa.table({"image_embedding": list(embeddings)}))
    return {name: pa.array(made[name], stage.writes.field(name).type).to_numpy() for name in stage.writes.names}


def test_laions_aesthetic_predictor_computes_as_in_torch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Aesthetic().eval()
    assert [n for n in model.state_dict() if n.endswith("weight")] == [f"layers.{n}.weight" for n in (0, 2, 4, 6, 7)]
    torch.save(model.state_dict(), tmp_path / "a.pth")
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    heads = [HeadConfig(name=kind, weights=str(tmp_path / f"a.{kind}")) for kind in ("pth", "safetensors")]
    vectors = unit(7, 768)
    found = run_heads(vectors, *heads)
    with torch.inference_mode():
        wanted = model(torch.from_numpy(vectors).float())[:, 0].numpy()
    assert list(found) == ["pth_score", "safetensors_score"] and wanted.std() > 1e-3
    for values in found.values():
        assert np.abs(values - wanted).max() < 1e-4


def test_a_probability_head_and_a_single_layer(tmp_path: Path) -> None:
    torch.manual_seed(1)
    deep = Aesthetic(16, nn.ReLU).eval()
    flat = nn.Linear(16, 1)
    torch.save(deep.state_dict(), tmp_path / "deep.pth")
    save_file(flat.state_dict(), tmp_path / "flat.safetensors")
    vectors = unit(5, 16)
    found = run_heads(
        vectors,
        HeadConfig(name="nsfw", weights=str(tmp_path / "deep.pth"), between="relu", ends_in="sigmoid"),
        HeadConfig(name="flat", weights=str(tmp_path / "flat.safetensors")),
    )
    with torch.inference_mode():
        given = torch.from_numpy(vectors).float()
        wanted = {"nsfw_score": deep(given)[:, 0].sigmoid(), "flat_score": flat(given)[:, 0]}
    for name, values in wanted.items():
        assert np.abs(found[name] - values.numpy()).max() < 1e-4


def test_layers_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    torch.manual_seed(2)
    layers = {f"layers.{n}": nn.Linear(a, b) for n, (a, b) in {2: (8, 8), 10: (8, 8), 11: (8, 1)}.items()}
    tensors = {f"{k}.{n}": t for k, layer in layers.items() for n, t in layer.state_dict().items()}
    save_file(tensors, tmp_path / "h.safetensors")
    vectors = unit(3, 8)
    with torch.inference_mode():
        wanted = nn.Sequential(*layers.values())(torch.from_numpy(vectors).float())[:, 0].numpy()
    found = run_heads(vectors, HeadConfig(name="h", weights=str(tmp_path / "h.safetensors")))
    assert np.abs(found["h_score"] - wanted).max() < 1e-4


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"0.weight": torch.zeros(4, 8), "1.weight": torch.zeros(1, 5)},
        {"0.weight": torch.zeros(2, 8)},
        {"0.weight": torch.zeros(1, 8), "0.running_mean": torch.zeros(8)},
        {"0.weight": torch.zeros(1, 8), "0.bias": torch.zeros(3)},
        {"0.weight": torch.zeros(1, 3, 8)},
    ],
)
def test_what_is_no_chain_of_layers_is_refused(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    torch.save(tensors, tmp_path / "h.pth")
    with pytest.raises(ValueError, match=r"head h: .*h.pth is no chain of linear layers to one number") as raised:
        Heads(HeadsConfig(model="m", heads=(HeadConfig(name="h", weights=str(tmp_path / "h.pth")),))).load()
    assert "\n" not in str(raised.value)


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("owned"),))


def test_weights_run_no_code_and_errors_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "h.pth").write_bytes(pickle.dumps({"0.weight": Evil()}))
    (tmp_path / "h.safetensors").write_bytes(b"none")
    for name in ("h.pth", "h.safetensors"):
        with pytest.raises(ValueError, match=f"head h: {name} is no state dict of tensors") as raised:
            Heads(HeadsConfig(model="m", heads=(HeadConfig(name="h", weights=name),))).load()
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "owned").exists()
    absent = Heads(HeadsConfig(model="m", heads=(HeadConfig(name="h", weights="gone.pth"),)))
    for call in (absent.load, absent.identity):
        with pytest.raises(FileNotFoundError, match=r"head h: no weights at gone\.pth"):
            call()


def test_a_head_for_other_embeddings_is_refused(tmp_path: Path) -> None:
    save_file(nn.Linear(8, 1).state_dict(), tmp_path / "h.safetensors")
    head = HeadConfig(name="h", weights=str(tmp_path / "h.safetensors"))
    with pytest.raises(ValueError, match="is for embeddings of width 8, clip has 16"):
        run_heads(unit(2, 16), head)

    class Pictures(Small):
        name = "pictures"
        writes = pa.schema([("image", pa.binary())])

    stages = [Pictures(SmallConfig()), Embed(EmbedConfig(model="a/clip"))]
    check_stages([*stages, Heads(HeadsConfig(model="a/clip", heads=(head,)))])
    with pytest.raises(ValueError, match="'heads' is set for b/clip@main, but 'image_embedding'"):
        check_stages([*stages, Heads(HeadsConfig(model="b/clip", heads=(head,)))])


def test_other_weights_are_another_stage_wherever_they_lie(tmp_path: Path) -> None:
    ids = []
    for name, value in (("a", 1.0), ("b", 1.0), ("c", 2.0)):
        save_file({"weight": torch.full((1, 8), value)}, tmp_path / f"{name}.safetensors")
        head = HeadConfig(name="h", weights=str(tmp_path / f"{name}.safetensors"))
        ids.append(Heads(HeadsConfig(model="m", heads=(head,))).config_id)
    assert ids[0] == ids[1] != ids[2]


def test_heads_are_named() -> None:
    for names in ((), ("a", "a")):
        with pytest.raises(ValueError, match="each with a name of its own"):
            HeadsConfig(model="m", heads=tuple(HeadConfig(name=n, weights="w") for n in names))
    for name in ("clip", "alt", "min_sentence"):
        with pytest.raises(ValueError, match=f"head {name}: {name}_score is what the score stage writes"):
            HeadsConfig(model="m", heads=(HeadConfig(name=name, weights="w"),))
    with pytest.raises(ValueError, match="a head's name becomes a column"):
        HeadConfig(name="a-b", weights="w")
