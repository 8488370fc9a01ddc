"""Every pairing of the two papers and the next ones: a real run of two steps trains all that is to be, and nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.captions import TokenizerConfig, tokenizer_id
from pipeline.storage import Folder
from tests.tiny_denoisers import POOLED_WIDTH, make_pixart, make_sana, make_sdxl, make_unet
from tests.tiny_language_models import DEPTH, WIDTH, make_language_model
from tests.training_fixtures import LENGTH, make_view
from training import loop, lora
from training.configuration import DenoiserConfig, LanguageModelConfig, LoRAConfig, Phase, TrainingConfig
from training.connectors import ConnectorConfig, LaViConfig, MLPConfig, QueriesConfig, TSCConfig
from training.parts import Parts

BOTH = {"in_width": WIDTH, "width": WIDTH}
SMALL = {**BOTH, "blocks": 1, "heads": 2, "queries": 4}
TSC_ = TSCConfig(**SMALL, time_channels=8, time_width=8)
LAVI = LaViConfig(**BOTH, hidden_width=8)

LANGUAGE_MODELS = {
    "clip": (r".*self_attn\.([qkv]_proj|out_proj)",),
    "bert": (r".*attention\.self\.(query|key|value)",),
    "t5": lora.T5,
    "llama": lora.LLAMA,
}
"""Two encoders, an encoder of an encoder and decoder, and a decoder; where their LoRA lie."""
DENOISERS = {
    "unet": (make_unet, lora.UNET),
    "pixart": (make_pixart, lora.PIXART),
    "sdxl": (make_sdxl, lora.UNET),
    "sana": (make_sana, (lora.ATTENTION,)),
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One pairing."""

    language_model: str
    denoiser: str
    connector: ConnectorConfig
    lora: bool = False
    layers: str | int = "last"
    beside: bool = False

    @property
    def name(self) -> str:
        """For the test's report."""
        more = [
            word
            for word, is_so in (("lora", self.lora), ("clip", self.beside), ("layers", self.layers == "all"))
            if is_so
        ]
        timestep = getattr(self.connector, "timestep", "adaln")
        kind = self.connector.kind if timestep == "adaln" else timestep
        return "-".join([self.language_model, kind, self.denoiser, *more])


PAPERS = [
    Cell(language_model=language_model, denoiser=denoiser, connector=connector, lora=connector is LAVI)
    for language_model in LANGUAGE_MODELS
    for denoiser in ("unet", "pixart")
    for connector in (TSC_, LAVI)
]
"""ELLA and LaVi-Bridge: all of theirs."""
FURTHER = [
    Cell(
        language_model="t5",
        denoiser="sdxl",
        connector=TSCConfig(**SMALL, time_channels=8, time_width=8, pooled_width=POOLED_WIDTH),
    ),
    Cell(language_model="llama", denoiser="sana", connector=LAVI, lora=True),
    Cell(language_model="t5", denoiser="unet", connector=MLPConfig(**BOTH)),
    Cell(language_model="t5", denoiser="unet", connector=TSCConfig(**SMALL, timestep="off")),
    Cell(
        language_model="t5",
        denoiser="unet",
        connector=TSCConfig(**SMALL, timestep="adaln_zero", time_channels=8, time_width=8),
    ),
    Cell(language_model="llama", denoiser="sana", connector=QueriesConfig(**SMALL)),
    Cell(
        language_model="llama",
        denoiser="unet",
        connector=TSCConfig(**SMALL, layers=DEPTH, time_channels=8, time_width=8),
        layers="all",
    ),
    Cell(language_model="t5", denoiser="unet", connector=TSC_, beside=True),
]
"""The ablations and what came after the papers."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of every family, and one view with the tokens of all."""
    root = tmp_path_factory.mktemp("cells")
    for name in LANGUAGE_MODELS:
        make_language_model(root / name, name)
    for name, (make, _) in DENOISERS.items():
        make(root / name, width=WIDTH)
    others = [TokenizerConfig(name=n, model=str(root / n), max_length=LENGTH) for n in LANGUAGE_MODELS if n != "t5"]
    make_view(root / "dataset", "small", 8, tokenizer_id(str(root / "t5"), None), others=others)
    return root


def config_of(cell: Cell, world: Path) -> TrainingConfig:
    """Two steps of four samples. Without weight decay, so that only what a gradient reaches moves."""
    of_language_model, of_denoiser = (
        LoRAConfig(targets=targets, rank=2, dropout=0.1) if cell.lora else None
        for targets in (LANGUAGE_MODELS[cell.language_model], DENOISERS[cell.denoiser][1])
    )
    return TrainingConfig(
        connector=cell.connector,
        language_model=language_model_config(world, cell.language_model, layers=cell.layers, lora=of_language_model),
        denoiser=DenoiserConfig(model=str(world / cell.denoiser), lora=of_denoiser),
        beside=language_model_config(world, "clip") if cell.beside else None,
        phases=(Phase(view="small", resolution=8, samples=8, batch=4, micro_batch=4, rate=1e-2),),
        weight_decay=0.0,
        ema_decay=0.9,
        measure_peak=cell.lora,  # FLOPs are counted in every model with a LoRA, and change nothing
    )


def language_model_config(world: Path, name: str, **changes: object) -> LanguageModelConfig:
    return LanguageModelConfig(model=str(world / name), tokenizer=name, max_length=LENGTH, **changes)  # type: ignore[arg-type]


def tensors_of(parts: Parts) -> Iterator[tuple[str, torch.Tensor]]:
    """All weights and buffers of all models, but what is trained."""
    trained = {id(parameter) for parameter in parts.bridge.parameters()}
    models: dict[str, nn.Module] = {
        "language model": parts.language_model.module,
        "network": parts.denoiser.network,
        "vae": parts.denoiser.vae,
    }
    if parts.beside:
        models["beside"] = parts.beside.module
    for name, module in models.items():
        for path, tensor in (*module.named_parameters(), *module.named_buffers()):
            if id(tensor) not in trained:
                yield f"{name}: {path}", tensor


def digests(parts: Parts) -> dict[str, str]:
    return {name: hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest() for name, tensor in tensors_of(parts)}


def weights_of(parts: Parts) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in parts.bridge.named_parameters()}


def waits(cell: Cell, name: str) -> bool:
    """Whether a weight can have no gradient at the first step: what comes after it is zero at the start.

    A LoRA's A comes before its B. AdaLN-Zero's gates hide attention and feed-forward, and so the text, at first.
    """
    if getattr(cell.connector, "timestep", "") == "adaln_zero":
        return any(part in name for part in (".attn.", ".mlp.", ".ln_2.", ".proj_in."))
    return name.endswith("lora_A.weight")


def test_a_lora_behind_what_is_read_is_refused(world: Path, tmp_path: Path) -> None:
    """With the last layer but one, nothing of the last can be trained."""
    cell = Cell(language_model="llama", denoiser="unet", connector=LAVI, lora=True, layers=-2)
    with pytest.raises(
        ValueError, match=r"no gradient reaches language_model_lora.layers.2.self_attn.q_proj.lora_A.weight"
    ):
        loop.train(config_of(cell, world), dataset=Folder(url=str(world / "dataset")), run=tmp_path)


@pytest.mark.parametrize("cell", [*PAPERS, *FURTHER], ids=lambda cell: cell.name)
def test_all_that_is_to_be_trained_is_and_nothing_else_moves(
    cell: Cell, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Parts] = []
    frozen: list[dict[str, str]] = []
    steps: list[dict[str, torch.Tensor]] = []
    load, commit = loop.load_parts, loop._commit

    def loaded(*given):
        kept.append(load(*given))
        frozen.append(digests(kept[0]))
        steps.append(weights_of(kept[0]))
        return kept[0]

    def committed(*given):
        commit(*given)
        steps.append(weights_of(kept[0]))

    monkeypatch.setattr(loop, "load_parts", loaded)
    monkeypatch.setattr(loop, "_commit", committed)
    result = loop.train(config_of(cell, world), dataset=Folder(url=str(world / "dataset")), run=tmp_path)
    assert (result.steps, result.skipped, result.bad, len(steps)) == (2, 0, 0, 3)

    assert digests(kept[0]) == frozen[0]
    assert len(frozen[0]) > 100
    assert not any(tensor.requires_grad for _, tensor in tensors_of(kept[0]))
    assert any("lora" in name for name in steps[0]) is cell.lora
    for (before, after), at_first in zip(pairwise(steps), (True, False), strict=True):
        still = {name for name, tensor in after.items() if torch.equal(tensor, before[name])}
        assert still == {name for name in after if at_first and waits(cell, name)}
