"""The settings of the frozen models: which they are, how they are held in memory, and what is trained inside them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.captions import TokenizerConfig, prompt_facts
from pipeline.fingerprint import file_digest, model_id, plain

if TYPE_CHECKING:
    from .denoisers import Denoiser
    from .language_models import LanguageModel


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Low-rank matrices that are trained inside a model that is otherwise frozen (Hu et al. 2021, arXiv 2106.09685)."""

    targets: tuple[str, ...]
    """Regular expressions for paths of linear and convolution layers, such as `.*attn\\d\\.to_[qkv]`; each must match a whole
    path, and one that matches nothing is refused."""
    rank: int = 32
    """LaVi-Bridge: 32."""
    alpha: float = 32.0
    """What the product of the matrices is multiplied with, times 1 / rank."""
    dropout: float = 0.0
    """On what comes into the matrices. LaVi-Bridge: 0.1, on what comes out."""
    rate_scale: float = 1.0
    """Their learning rate, as a multiple of the phase's."""

    def __post_init__(self) -> None:
        if isinstance(self.targets, str):
            raise ValueError(f"lora.targets is the text {self.targets!r}: give a tuple of regular expressions")
        if not self.targets:
            raise ValueError("lora.targets is empty: name the layers by regular expressions, or set lora to None")
        for target in self.targets:
            try:
                re.compile(target)
            except re.error as error:
                raise ValueError(f"lora.targets: {target!r} is no regular expression: {error}") from None
        if self.rank < 1 or self.alpha <= 0 or self.rate_scale <= 0:
            raise ValueError(
                f"lora: rank {self.rank}, alpha {self.alpha} and rate_scale {self.rate_scale} must be above 0"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout is {self.dropout}: it must be in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """Which language model, and everything that changes its hidden states."""

    model: str
    """Folder or hub name of a text encoder (CLIP text, BERT), of an encoder with a decoder, which is left out (T5, T5Gemma), or
    of a decoder (Llama, Qwen, Gemma)."""
    revision: str | None = None
    """Revision on the hub; pin it."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of every weight, those too that transformers would keep in float32 (some of T5's); ELLA's features are float16."""
    max_length: int | Literal["flexible"] = 128
    """Longest prompt in tokens, its end token included; "flexible" is the tokenizer's own limit."""
    padding: Literal["fixed", "longest"] = "fixed"
    """Pad to `max_length` (as ELLA) or to the longest of the batch."""
    pads: Literal["hidden", "seen"] = "hidden"
    """Whether the mask hides pads; "seen" gives no mask at all, as Stable Diffusion runs its CLIP."""
    tokenizer: str = "t5"
    """The view's name for the tokens that this model reads."""
    subfolder: str = ""
    """Of `model`, where the weights lie: "text_encoder" in a Stable Diffusion repository."""
    tokenizer_subfolder: str = ""
    """Of `tokenizer_model` or `model`, where the tokenizer lies."""
    tokenizer_model: str | None = None
    """Folder or hub name of the tokenizer where it does not lie with the model."""
    template: Literal["raw", "chat"] = "raw"
    """Whether prompts stand in the tokenizer's chat template, as `TokenizerConfig.template`."""
    instruction: str = ""
    """Words before every prompt, as `TokenizerConfig.instruction`."""
    layers: Literal["last", "mean", "all"] | int = "last"
    """Which hidden states are read: the last, after the model's final norm; those after so many layers (0 is the embeddings,
    -2 the last but one); the mean of all but the embeddings, each normalised (Wang et al. 2025, arXiv 2506.08210: better than
    the last for decoders); or all of these, for a connector that weighs them (`layers` in its settings)."""
    quantize: Literal["none", "8bit", "4bit"] = "none"
    """Weights of 8 or 4 bits, for a large model on a small GPU, which is needed (extra `quantization`). They stay on that GPU."""
    lora: LoRAConfig | None = None
    """Matrices trained inside it; gradients then flow through the whole model."""

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("language_model.model is empty: name a folder or a model on the hub")
        if self.dtype not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"language_model.dtype is {self.dtype!r}: choose float32, float16 or bfloat16")
        if self.max_length == "flexible" and self.padding == "fixed":
            raise ValueError("language_model: max_length='flexible' needs padding='longest'")
        if self.padding not in ("fixed", "longest"):
            raise ValueError(f"language_model.padding is {self.padding!r}: choose 'fixed' or 'longest'")
        if self.pads not in ("hidden", "seen"):
            raise ValueError(f"language_model.pads is {self.pads!r}: choose 'hidden' or 'seen'")
        if self.pads == "seen" and self.padding == "longest":
            raise ValueError("language_model: pads='seen' needs padding='fixed', else features depend on the batch")
        if self.layers not in ("last", "mean", "all") and type(self.layers) is not int:
            raise ValueError(
                f"language_model.layers is {self.layers!r}: choose 'last', 'mean', 'all' or a layer's number"
            )
        if self.quantize not in ("none", "8bit", "4bit"):
            raise ValueError(f"language_model.quantize is {self.quantize!r}: choose 'none', '8bit' or '4bit'")
        _ = self.prompts  # checks the rest

    @property
    def prompts(self) -> TokenizerConfig:
        """How prompts become ids; a view's tokens must have been made in this way."""
        return TokenizerConfig(
            name=self.tokenizer,
            model=self.tokenizer_model or self.model,
            revision=self.revision,
            subfolder=self.tokenizer_subfolder,
            max_length=self.max_length,
            template=self.template,
            instruction=self.instruction,
            id_type="int32",
        )

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must say of the features that its connector was trained on."""
        return {
            "model": model_id(self.model, self.revision),
            "subfolder": self.subfolder,
            "tokenizer": prompt_facts(self.prompts)["id"],
            "dtype": self.dtype,
            "max_length": self.max_length,
            "template": self.template,
            "instruction": self.instruction,
            "padding": self.padding,
            "pads": self.pads,
            "layers": self.layers,
            "quantize": self.quantize,
            "lora": plain(self.lora) if self.lora else None,
        }

    def load(self) -> LanguageModel:
        """Tokenizer and frozen model, on the CPU. Raises OSError or ValueError that says what is missing."""
        from .language_models import load_language_model

        return load_language_model(self)


@dataclass(frozen=True, kw_only=True)
class DenoiserConfig:
    """Which diffusion model, and how it is held in memory."""

    model: str
    """Folder or hub name of a diffusers pipeline with `unet` or `transformer`, `vae` and `scheduler`."""
    revision: str | None = None
    """Revision on the hub; pin it."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of network and VAE; the loss is always float32."""
    gradient_checkpointing: bool = False
    """Compute the network's activations twice to hold fewer: for 1024 pixels on a small GPU."""
    single_file: str | None = None
    """A community checkpoint's one `.safetensors` file, whose weights replace those of `model`; `model` then says only what
    shape they have, and gives VAE and schedule."""
    lora: LoRAConfig | None = None
    """Matrices trained inside the network."""

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("denoiser.model is empty: name a diffusers folder or a model on the hub")
        if self.dtype not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"denoiser.dtype is {self.dtype!r}: choose float32, float16 or bfloat16")
        if self.single_file is not None and not self.single_file.endswith(".safetensors"):
            raise ValueError(
                f"denoiser.single_file is {self.single_file!r}: only .safetensors, as other formats may run code when read"
            )

    def identity(self) -> dict[str, Any]:
        """What settings and files alone tell of `Denoiser.identity`."""
        return {
            "model": model_id(self.model, self.revision),
            "single_file": file_digest(Path(self.single_file)) if self.single_file else None,
            "lora": plain(self.lora) if self.lora else None,
        }

    def load(self, *, with_vae: bool = True) -> Denoiser:
        """The frozen parts, on the CPU; the VAE only where pictures are to be encoded or decoded. Raises OSError or
        ValueError in one line that says what is missing.
        """
        from .denoisers import load_denoiser

        return load_denoiser(self, with_vae=with_vae)
