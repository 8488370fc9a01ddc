"""Speed settings change how a result is computed, not the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.storage import Folder
from tests.tiny_denoisers import make_pixart, make_sana, make_sdxl, make_unet, random_conditioning, random_latents
from tests.training_fixtures import make_world, training_config
from training import loop
from training.configuration import LoRAConfig, SpeedConfig
from training.denoisers import Denoiser, DenoiserConfig
from training.speed import lay_out, set_kernels


@pytest.fixture(autouse=True)
def compiled_without_code(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks are traced as for a GPU, but what was traced is run as it is."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **settings: compile_module(self, backend="eager", **settings)
    )
    yield
    torch._dynamo.reset()


def gradients(denoiser: Denoiser) -> list[torch.Tensor]:
    """What is predicted of random latents, and the gradient that reaches the tokens."""
    given = random_conditioning(denoiser)
    predicted = denoiser.predict(random_latents(denoiser), denoiser.levels.times[[3, 700]], given)
    predicted.square().sum().backward()
    assert given.tokens.grad is not None
    return [predicted.detach(), given.tokens.grad]


@pytest.mark.parametrize(
    ("make", "checkpointing"),
    [(make_unet, False), (make_sdxl, True), (make_pixart, False), (make_sana, True)],
)
def test_layout_and_compiled_blocks_keep_the_result(
    make: Callable[[Path], Path], checkpointing: bool, tmp_path: Path
) -> None:
    config = DenoiserConfig(model=str(make(tmp_path)), gradient_checkpointing=checkpointing)
    plain, fast = config.load(), config.load()
    lay_out(SpeedConfig(channels_last=True, compile="blocks"), fast)
    for module in (fast.network, fast.vae):
        convolutions = [m.weight for m in module.modules() if isinstance(m, torch.nn.Conv2d)]
        assert convolutions and all(w.is_contiguous(memory_format=torch.channels_last) for w in convolutions)
    torch._dynamo.utils.counters.clear()
    for one, other in zip(gradients(plain), gradients(fast), strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]
    pixels = torch.rand(1, 3, 8, 8) * 2 - 1
    assert torch.allclose(plain.encode_images(pixels), fast.encode_images(pixels), atol=1e-5)


def test_residual_blocks_are_compiled_where_asked_for(tmp_path: Path) -> None:
    config = DenoiserConfig(model=str(make_unet(tmp_path)))
    compiled = {}
    for choice in ("off", "transformers", "blocks"):
        denoiser = config.load(with_vae=False)
        lay_out(SpeedConfig(compile=choice), denoiser)  # type: ignore[arg-type]
        blocks = [m for m in denoiser.network.modules() if m._compiled_call_impl is not None]
        compiled[choice] = {type(m).__name__ for m in blocks}
    assert compiled == {
        "off": set(),
        "transformers": {"BasicTransformerBlock"},
        "blocks": {"BasicTransformerBlock", "ResnetBlock2D"},
    }


def test_what_is_trained_keeps_its_layout(tmp_path: Path) -> None:
    lora = LoRAConfig(targets=(r".*resnets\.\d+\.conv\d",), rank=2)
    denoiser = DenoiserConfig(model=str(make_unet(tmp_path)), lora=lora).load(with_vae=False)
    before = {name: weight.stride() for part in denoiser.lora.values() for name, weight in part.named_parameters()}
    lay_out(SpeedConfig(channels_last=True), denoiser)
    after = {name: weight.stride() for part in denoiser.lora.values() for name, weight in part.named_parameters()}
    assert before == after


def test_kernels_are_left_alone_unless_asked_for() -> None:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.benchmark
    try:
        set_kernels(SpeedConfig())
        assert (matmul.allow_tf32, cudnn.benchmark) == before
        set_kernels(SpeedConfig(tf32=True, search_kernels=True))
        assert (matmul.allow_tf32, cudnn.benchmark) == (True, True)
    finally:
        matmul.allow_tf32, cudnn.benchmark = before


def test_settings_may_change_between_sittings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run begun without them goes on with them, to the same weights but for rounding."""
    config, commit = training_config(make_world(tmp_path)), loop._commit
    dataset = Folder(url=str(tmp_path / "dataset"))

    def crash(sitting, state, *rest):  # type: ignore[no-untyped-def]
        commit(sitting, state, *rest)
        if state.samples == 36 and sitting.journal.run.name == "fast":
            raise KeyboardInterrupt

    plain = loop.train(config, dataset=dataset, run=tmp_path / "plain")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "_commit", crash)
        loop.train(config, dataset=dataset, run=tmp_path / "fast")
    speed = SpeedConfig(channels_last=True, encode_ahead=False)
    fast = loop.train(replace(config, speed=speed), dataset=dataset, run=tmp_path / "fast")
    expected, found = (load_file(run.release / "connector.safetensors") for run in (plain, fast))
    for name, weight in expected.items():
        if not name.endswith("in_proj_bias"):  # a key's bias has no gradient but rounding, which Adam makes large
            assert torch.allclose(weight, found[name], atol=1e-4), name


def test_a_setting_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match=r"speed.compile is 'all': choose one of off, transformers, blocks"):
        SpeedConfig(compile="all")  # type: ignore[arg-type]


def test_compiled_blocks_must_not_draw() -> None:
    lora = LoRAConfig(targets=("x",), dropout=0.1)
    denoiser, speed = DenoiserConfig(model="m", lora=lora), SpeedConfig(compile="blocks")
    with pytest.raises(ValueError, match=r"speed.compile is 'blocks', and compiled blocks would draw other dropout"):
        replace(training_config(Path("w")), denoiser=denoiser, speed=speed)
    replace(training_config(Path("w")), denoiser=replace(denoiser, lora=replace(lora, dropout=0.0)), speed=speed)
