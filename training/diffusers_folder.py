"""A folder that diffusers loads: the base by its name, and a release that draws with it.

    pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=f"{folder}/pipeline.py", trust_remote_code=True)
    pipeline("a dense prompt", num_inference_steps=50).images

or `load_pipeline(folder)`. Either takes another dtype than the release was trained beside (`torch_dtype=` there, one for all),
gives the base's own pipeline (StableDiffusionPipeline, say) under the hooks of `pipelines.py`, and reads prompts in words.
`from_pipe` makes its img2img, inpainting and ControlNet siblings, which share the network and are given
`pipeline.attached.encode(prompts)`. Of a folder on the hub, load what `snapshot_download` gives.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from pipeline.fingerprint import plain

from .model_configuration import DenoiserConfig, LanguageModelConfig, LoRAConfig
from .pipelines import Attached, attach
from .releases import load_bridge, read_release

RELEASE = "release"
"""Where the release lies in the folder, as a component of the pipeline."""
MODELS = "models.json"
"""Says there which models the release goes with."""
_PROBLEM = """
try:
    from_densebridge = importlib.import_module("training.diffusers_folder")
except ImportError as error:
    raise ImportError("this pipeline draws with a connector of densebridge: install densebridge first") from error
"""
# diffusers copies these files away before it reads them, so they only lead to the installed package.
_FILES = {
    "pipeline.py": f'"""Draws with a connector of densebridge."""\n\nimport importlib\n{_PROBLEM}\n'
    "ConnectorPipeline = from_densebridge.ConnectorPipeline\n",
    f"{RELEASE}/release.py": f'"""A connector of densebridge."""\n\nimport importlib\n{_PROBLEM}\n'
    "Release = from_densebridge.Release\n",
}


def save_pipeline(
    folder: Path,
    *,
    release: Path,
    language_model: LanguageModelConfig,
    denoiser: DenoiserConfig,
    beside: LanguageModelConfig | None = None,
) -> Path:
    """Writes the folder; `release` is a finished run's. The base and the language model are named and not copied.

    Raises FileNotFoundError or ValueError where there is no release, FileExistsError where the folder holds something.
    """
    files = ["connector.json", *read_release(release)["files"]]
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: name a new folder")
    (folder / RELEASE).mkdir(parents=True)
    for name in files:
        shutil.copyfile(release / name, folder / RELEASE / name)
    models = {
        name: config and _with_whole_path(config)
        for name, config in (("language_model", language_model), ("denoiser", denoiser), ("beside", beside))
    }
    (folder / RELEASE / MODELS).write_text(json.dumps(plain(models), indent=1) + "\n")
    for name, text in _FILES.items():
        (folder / name).write_text(text)
    index = {
        "_class_name": ["pipeline", ConnectorPipeline.__name__],
        "_diffusers_version": diffusers.__version__,
        RELEASE: ["release", Release.__name__],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=1) + "\n")
    return folder


def load_pipeline(folder: Path | str, dtype: torch.dtype | None = None) -> Any:
    """The base's own pipeline, attached, on the CPU; `.attached` has what `attach` gave.

    `dtype` is that of network and VAE: float32, float16 or bfloat16; None is the training's. The language model keeps its own,
    which the connector was trained on. Raises as the loaders do.
    """
    return _load(Path(folder) / RELEASE, dtype)


class Release(nn.Module):
    """A release as a component of a diffusers pipeline: its place, and the dtype asked for, which only a component is told,
    and the dtype only one that is a module.
    """

    def __init__(self, folder: Path, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.folder, self.dtype = folder, dtype

    @classmethod
    def from_pretrained(cls, folder: str, torch_dtype: torch.dtype | None = None) -> Release:
        """As diffusers calls it."""
        return cls(Path(folder), torch_dtype)


class ConnectorPipeline(diffusers.DiffusionPipeline):
    """What `from_pretrained` is to make: it gives the base's own pipeline instead, of whatever class that is."""

    def __new__(cls, release: Release) -> Any:  # type: ignore[misc]
        return _load(release.folder, release.dtype)

    def __init__(self, release: Release) -> None:
        """Never called; from_pretrained reads here that there is a component `release`."""


class _Prompted:
    """Stands before a pipeline's class, so that the call takes prompts in words."""

    attached: Attached

    def __call__(
        self, prompt: str | Sequence[str] | None = None, *, negative_prompt: str | Sequence[str] = "", **settings: Any
    ) -> Any:
        """The pipeline's own call with its own settings; given `prompt`, what the language model makes of it goes along."""
        if prompt is not None:
            settings |= self.attached.encode(prompt, negative_prompt)
        return super().__call__(**settings)  # type: ignore[misc]


def _load(release: Path, dtype: torch.dtype | None) -> Any:
    if not (release / MODELS).is_file():
        raise FileNotFoundError(
            f"{release.parent} holds no release of densebridge ({RELEASE}/{MODELS}): name another folder"
        )
    found = json.loads((release / MODELS).read_text())
    given = {} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")}
    denoiser_config = _read_config(DenoiserConfig, found["denoiser"] | given)
    language_model = _read_config(LanguageModelConfig, found["language_model"]).load()
    beside = _read_config(LanguageModelConfig, found["beside"]).load() if found["beside"] else None
    denoiser = denoiser_config.load(with_vae=False)  # its LoRA, if it has one, is in its network
    bridge = load_bridge(release, language_model=language_model, denoiser=denoiser, beside=beside)
    base, revision = denoiser_config.model, denoiser_config.revision
    facts = diffusers.DiffusionPipeline.load_config(base, revision=revision)
    kind = getattr(diffusers, facts["_class_name"])
    absent = {name: None for name in facts if name.startswith(("text_encoder", "tokenizer"))}
    pipeline = type(kind.__name__, (_Prompted, kind), {}).from_pretrained(  # type: ignore[attr-defined]
        base,
        revision=revision,
        torch_dtype=getattr(torch, denoiser_config.dtype),
        use_safetensors=True,
        **{denoiser.subfolder: denoiser.network},
        **absent,
    )
    pipeline.attached = attach(pipeline, language_model=language_model, bridge=bridge, beside=beside)
    return pipeline


def _read_config(kind: type[Any], facts: dict[str, Any]) -> Any:
    """A configuration of a model from what `plain` made of it."""
    lora = facts["lora"] and LoRAConfig(**{**facts["lora"], "targets": tuple(facts["lora"]["targets"])})
    return kind(**{name: value for name, value in facts.items() if name != "lora"}, lora=lora)


def _with_whole_path(config: Any) -> Any:
    """The configuration of a model with the whole paths of what lies in a folder or file and is no name on the hub."""
    places = {name: getattr(config, name, None) for name in ("model", "tokenizer_model", "single_file")}
    whole = {name: str(Path(place).resolve()) for name, place in places.items() if place and Path(place).exists()}
    return dataclasses.replace(config, **whole)
