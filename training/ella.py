"""A TSC as ELLA's one file of weights, both ways: float16, under the names of its code (TencentQQGYLab/ELLA), which ComfyUI-ELLA
reads as well.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from .bridge import Bridge, Weights
from .connectors import ConnectorConfig, TSCConfig
from .model_configuration import LanguageModelConfig
from .whole_files import load_weights, save_weights

RELEASED = "ella-sd1.5-tsc-t5xl.safetensors"
"""The name of the file that ELLA's authors released, which others look for."""
_ADVICE = "export to diffusers instead"


def save_ella(weights: Weights, config: ConnectorConfig, path: Path) -> Path:
    """Writes a release's connector part. The same weights give the same bytes.

    Raises ValueError in one line for a connector that ELLA's code has no module for, or for values beyond float16.
    """
    check_ella(config)
    halves = {name: tensor.half() for name, tensor in sorted(weights.items())}
    for name, tensor in halves.items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} has values that float16 cannot hold: export to diffusers instead")
    save_weights(halves, path)
    return path


def load_ella(path: Path | str, config: ConnectorConfig | None = None) -> Bridge:
    """ELLA's file as a frozen bridge in float32, on the CPU; None is the shape of the released weights.

    Raises FileNotFoundError, or ValueError where it is another kind of file or naming the first tensor that is missing,
    unknown or of another shape.
    """
    path, config = Path(path), TSCConfig() if config is None else config
    check_ella(config)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: name ELLA's .safetensors file")
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file ({error}): download it again") from None
    bridge = Bridge(config)
    load_weights(bridge.connector, weights, path)
    return bridge.eval().requires_grad_(False)


def check_ella(config: ConnectorConfig) -> None:
    """Raises ValueError in one line where ELLA's code has no module for this connector."""
    if not isinstance(config, TSCConfig):
        raise ValueError(f"ELLA's code knows the tsc alone, this connector is a {config.kind}: {_ADVICE}")
    for name, wanted in (("timestep", "adaln"), ("layers", 1), ("pooled_width", None)):
        if getattr(config, name) != wanted:
            raise ValueError(f"ELLA's code knows no tsc with {name} {getattr(config, name)!r}: {_ADVICE}")


def check_features(config: LanguageModelConfig) -> None:
    """Raises ValueError in one line where ELLA's code cannot make the features that a connector was trained on: it reads the
    last layer of the bare prompt.
    """
    for name, wanted in (("layers", "last"), ("template", "raw"), ("instruction", "")):
        if getattr(config, name) != wanted:
            raise ValueError(f"ELLA's code knows no language_model with {name} {getattr(config, name)!r}: {_ADVICE}")


def file_name(config: ConnectorConfig, language_model: LanguageModelConfig) -> str:
    """What ELLA's file is called: as the released one where it may stand in for it, between SD 1.x and flan-T5-XL in float16,
    of 128 tokens with pads that the TSC sees.
    """
    read = (language_model.dtype, language_model.max_length, language_model.padding, language_model.pads)
    stands_in = (
        not arguments(config)
        and getattr(config, "use_mask", None) == "all"
        and Path(language_model.model).name == "flan-t5-xl"
        and read == ("float16", 128, "fixed", "hidden")
        and language_model.quantize == "none"
    )
    return RELEASED if stands_in else "ella-tsc.safetensors"


def arguments(config: ConnectorConfig) -> dict[str, int]:
    """What ELLA's class is to be given to build this TSC, where it is not as by default: empty for the released shape."""
    check_ella(config)
    assert isinstance(config, TSCConfig)
    return {name: size for name, size in _sizes(config).items() if size != _sizes(TSCConfig())[name]}


def _sizes(config: TSCConfig) -> dict[str, int]:
    return {
        "time_channel": config.time_channels,
        "time_embed_dim": config.time_width,
        "width": config.width,
        "layers": config.blocks,
        "heads": config.heads,
        "num_latents": config.queries,
        "input_dim": config.in_width,
    }
