"""What makes a run faster without changing what it computes: how frozen networks lie in memory, and which kernels run them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from .choices import check_choices

if TYPE_CHECKING:
    from .denoisers import Denoiser

_COMPILED = {"off": (), "transformers": ("TransformerBlock",), "blocks": ("TransformerBlock", "ResnetBlock2D")}
# A block is compiled for each shape that it meets: a U-Net's levels, a phase's resolution, with and without gradient. Dynamo
# gives up on a function after 8, and would run it as it is.
_SHAPES = 64


@dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """None of these changes what a run computes, beyond the rounding of other kernels, so they may change between its sittings.

    What each is worth is from others' measurements: NVIDIA's table of a trainer with a frozen SD 1.5 U-Net on one A100 (NeMo
    24.12, ControlNet: 11.7 images a second plain, 27.2 in the end). `python -m benchmarks.gpu` measures them here.
    """

    channels_last: bool = False
    """Weights of convolutions as (out, height, width, in), which tensor cores read without turning them over: +23 %."""
    compile: Literal["off", "transformers", "blocks"] = "off"
    """Compiles the denoiser's repeated blocks, its transformer blocks alone or the residual ones too: +6 % after channels_last.
    The first step of each phase takes seconds (transformers) to minutes (blocks)."""
    search_kernels: bool = False
    """cuDNN tries its convolutions once for each shape and keeps the fastest. Which one that is may differ between sittings, and
    with it the last bits of a result."""
    tf32: bool = False
    """What is multiplied in float32 on a GPU is rounded to TF32's 10 bits first: for runs whose models are not cast."""
    encode_ahead: bool = True
    """On a GPU the frozen models encode the next micro-batch on a stream of their own, while gradients are averaged over
    processes and the step's result is waited for. Costs the memory of one more micro-batch's encoding. Nothing changes in what
    is computed; where the language model is trained (LoRA, queries) it does not happen."""

    def __post_init__(self) -> None:
        check_choices(self, "speed.")


def set_kernels(config: SpeedConfig) -> None:
    """Tells the process's libraries which kernels they may choose from."""
    import torch

    if config.tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    if config.search_kernels:
        torch.backends.cudnn.benchmark = True


def lay_out(config: SpeedConfig, denoiser: Denoiser) -> None:
    """Has a denoiser's frozen weights lie as `channels_last` says, and its blocks compiled when they first run."""
    if config.channels_last:
        for module in (denoiser.network, denoiser.vae):
            if module is not None:
                _turn_convolutions(module)
    if config.compile != "off":
        _compile_blocks(denoiser.network, _COMPILED[config.compile])


def _turn_convolutions(module: Any) -> None:
    """What is trained stays as it is: its gradient is averaged in buckets, which have an order of their own."""
    import torch

    for weight in module.parameters():
        if weight.ndim == 4 and not weight.requires_grad:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)


def _compile_blocks(network: Any, kinds: tuple[str, ...]) -> None:
    """By the ends of their classes' names: diffusers' own `compile_repeated_blocks` knows neither PixArt's nor SANA's."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(_SHAPES, torch._dynamo.config.recompile_limit)
    for block in network.modules():
        if type(block).__name__.endswith(kinds):
            block.compile(dynamic=False)  # one kernel for all shapes would be slower than one for each
