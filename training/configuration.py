"""The settings of a training run, checked at construction."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .choices import check_choices
from .connectors import ConnectorConfig
from .model_configuration import DenoiserConfig, LanguageModelConfig, LoRAConfig
from .phases import Phase, TimestepConfig
from .speed import SpeedConfig
from .trackers import TrackerName, check_tracker_names
from .validation_configuration import Sampler, ValidationConfig

__all__ = [
    "DenoiserConfig",
    "LanguageModelConfig",
    "LoRAConfig",
    "Phase",
    "Sampler",
    "SpeedConfig",
    "TimestepConfig",
    "TrainingConfig",
    "ValidationConfig",
    "Weighting",
    "check_connector",
]


Weighting = Literal["plain", "min_snr", "debiased"]
"""How the losses at the noise levels are weighed: all alike, by min-SNR (Hang et al. 2023), or debiased (Yu et al. 2023)."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """One training run: what is trained, on what, and how. The defaults are ELLA's where ELLA states them."""

    connector: ConnectorConfig
    """What is trained."""
    language_model: LanguageModelConfig
    """Frozen, but for its LoRA."""
    denoiser: DenoiserConfig
    """Frozen, but for its LoRA."""
    phases: tuple[Phase, ...]
    """Legs of the run, in order."""
    beside: LanguageModelConfig | None = None
    """The denoiser's own text encoder, whose tokens stand behind the connector's: 64 of ELLA and 77 of CLIP, say. Frozen. It is
    one, of the denoiser's width; SDXL's two side by side are not driven."""
    seed: int = 0
    """Of the connector's start and of everything drawn by position."""
    weight_decay: float = 0.01
    """AdamW's, on every parameter."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's."""
    clip: float | None = 1.0
    """Largest norm of the gradient; None does not clip."""
    caption_drop: float = 0.1
    """Share of the captions that becomes the empty prompt, for classifier-free guidance."""
    crop: Literal["center", "random"] = "center"
    """Which square of an image that is not square. What a view with buckets holds is cut already."""
    flip: bool = False
    """Mirror half of the pictures left to right. Refused where captions speak of left and right, or with latents of a view."""
    timesteps: TimestepConfig = field(default_factory=TimestepConfig)
    """How timesteps are drawn."""
    timesteps_per_encoding: int = 1
    """At how many timesteps, each with its own noise, connector and denoiser see a sample that VAE and language model encoded
    once. Their share of the step is saved (a third of the FLOPs of SD 1.5 at 512 pixels at 4), and a batch's timesteps are
    more, but of fewer pictures. Memory: the denoiser's forward pass is of micro_batch times as many."""
    weighting: Weighting = "plain"
    """How much the losses at the noise levels count: all alike (ELLA), or with the weights of `objective.loss_weights`, which a
    flow has not."""
    gamma: float = 5.0
    """min_snr: the signal-to-noise ratio from which on levels of less noise do not count more (5 in the paper)."""
    ema_decay: float | None = None
    """Keep an average of the weights with this decay; None keeps none (ELLA)."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast of the connector; its master weights are float32 in any case."""
    fsdp: Literal["off", "connector"] = "off"
    """Where there are several processes: "off", each holds everything that is trained (DDP); "connector", a share of weights,
    moments and averages (FSDP2), for connectors that would not fit. Adapters train 3-6 times faster without (SimpleTuner).
    A validation takes a whole copy of the weights for its time. Checkpoints are alike, so it may change between two sittings."""
    checkpoint_every: int = 100_000
    """Samples between checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints that stay; at least 2, as the newest may prove damaged."""
    log_every: int = 10
    """Steps between log lines."""
    trackers: tuple[TrackerName, ...] = ("tensorboard",)
    """Where curves and pictures go beside the run folder's log.jsonl: TensorBoard's files in it, wandb, trackio."""
    measure_peak: bool = True
    """At the start, measure for a second how fast the device multiplies matrices and count the FLOPs of a sample, so that the log
    tells which share of the machine is used."""
    validation: ValidationConfig | None = None
    """Held-out loss, pictures and the best release while it trains; None looks at nothing."""
    skip_budget: int = 20
    """Steps of the whole run that may be skipped because loss or gradient is not finite."""
    bad_share: float = 0.05
    """Share of the run's samples so far that may be unreadable; beyond it the run stops. Ten may be in any case."""
    bad_in_a_row: int = 100
    """Unreadable samples in a row at which the run stops: a shard is lost, or the disk (Megatron-Energon's default)."""
    threads: int = 2
    """Threads per process that read and decode samples."""
    ahead: int = 3
    """Micro-batches that are read ahead."""
    cache: str | None = None
    """Folder on this machine for whole shards of a dataset that lies elsewhere; all processes share it. None asks for each
    sample by a request of its own. Of no use to a dataset on this machine."""
    cache_gib: float = 64
    """Most that lies in `cache`, GiB: at least what two windows of a phase take, or the view's shards where there is none."""
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    """Memory layouts and kernels."""

    def __post_init__(self) -> None:
        if not self.phases:
            raise ValueError("training.phases is empty: give at least one Phase")
        for name in ("caption_drop", "bad_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"training.{name} is {getattr(self, name)}: it is a share, from 0 to 1")
        counts = ("checkpoint_every", "log_every", "threads", "ahead", "bad_in_a_row", "timesteps_per_encoding")
        for name in (*counts, "cache_gib"):
            if getattr(self, name) < 1:
                raise ValueError(f"training.{name} is {getattr(self, name)}: it must be at least 1")
        if self.keep_checkpoints < 2:
            raise ValueError("training.keep_checkpoints must be at least 2: the newest may prove damaged")
        if self.clip is not None and self.clip <= 0:
            raise ValueError("training.clip must be above 0, or None not to clip")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"training.ema_decay is {self.ema_decay}: it must be between 0 and 1, or None")
        if self.gamma <= 0:
            raise ValueError(f"training.gamma is {self.gamma}: it must be above 0")
        check_choices(self, "training.")
        check_tracker_names(self.trackers)
        check_connector(self.connector, self.language_model)
        _check_fsdp(self)
        _check_beside(self.beside)
        _check_scaling(self)
        _check_crop(self.crop, self.flip, self.phases)
        _check_average(self.ema_decay, self.phases)
        _check_compiled(self)

    @property
    def samples(self) -> int:
        """Of all phases."""
        return sum(phase.samples for phase in self.phases)


def _check_compiled(training: TrainingConfig) -> None:
    """Raises ValueError where compiled blocks would draw: they do so otherwise than the same blocks uncompiled."""
    lora = training.denoiser.lora
    if training.speed.compile != "off" and lora is not None and lora.dropout:
        raise ValueError(
            f"training.speed.compile is {training.speed.compile!r}, and compiled blocks would draw other dropout of "
            "denoiser.lora: set its dropout to 0, or compile to 'off'"
        )


def check_connector(connector: ConnectorConfig, language_model: LanguageModelConfig) -> None:
    """Raises ValueError when the connector cannot read what the language model gives it, or when it would see pads whose
    number depends on the rest of the batch.
    """
    if (connector.layers > 1) != (language_model.layers == "all"):
        raise ValueError(
            f"{connector.kind}.layers is {connector.layers} and language_model.layers {language_model.layers!r}: to have "
            "hidden states weighed set them to the number of layers and to 'all', else to 1 and another choice"
        )
    if connector.kind == "queries" and language_model.pads == "seen":
        raise ValueError(
            "queries stand behind the prompt, before the pads, which must not be seen: set language_model.pads to 'hidden'"
        )
    if getattr(connector, "use_mask", "mask") == "all" and language_model.padding == "longest":
        raise ValueError(
            f"{connector.kind}.use_mask 'all' sees pads, and with language_model.padding 'longest' their number "
            "depends on the batch: use padding 'fixed' or use_mask 'mask'"
        )


def _check_scaling(training: TrainingConfig) -> None:
    """Raises ValueError where gradients go through a float16 model unscaled: most of them would be too small for it."""
    learns = training.language_model.lora is not None or training.connector.kind == "queries"
    for name, dtype, passed in (
        ("denoiser", training.denoiser.dtype, True),
        ("language_model", training.language_model.dtype, learns),
    ):
        if passed and dtype == "float16" and training.precision != "fp16":
            raise ValueError(
                f"{name}.dtype is 'float16' and training.precision {training.precision!r}: gradients would vanish on their way "
                "back, use precision 'fp16', which scales them, or dtype 'bfloat16'"
            )


def _check_fsdp(training: TrainingConfig) -> None:
    """Raises ValueError where what is trained cannot be held in pieces: only the bridge's own forward puts them together."""
    if training.fsdp == "off":
        return
    inside = training.language_model.lora or training.denoiser.lora or training.connector.kind == "queries"
    if inside:
        raise ValueError(
            "training.fsdp is 'connector', but LoRA and queries are read inside the frozen models, in one piece: set fsdp "
            "to 'off', they are small"
        )
    if training.precision == "fp16":
        raise ValueError("training.fsdp is 'connector', which has no scaler for precision 'fp16': use 'bf16' or 'no'")


def _check_beside(beside: LanguageModelConfig | None) -> None:
    """Raises ValueError when the second text encoder is to be changed."""
    if beside is not None and (beside.lora or beside.layers != "last"):
        raise ValueError("training.beside is read as it is: set its lora to None and its layers to 'last'")


def _check_crop(crop: str, flip: bool, phases: tuple[Phase, ...]) -> None:
    """Raises ValueError when squares are to be drawn of pictures, or these mirrored, whose latents are of the middle."""
    stored = [view for phase in phases if phase.latents == "view" for view in phase.views]
    if stored and crop != "center":
        raise ValueError(
            f"training.crop is {crop!r}, but the latents of view {stored[0]!r} are of the middle of its pictures: set crop "
            "to 'center', or the phase's latents to 'off'"
        )
    if stored and flip:
        raise ValueError(
            f"training.flip is set, but the latents of view {stored[0]!r} are of its pictures as they are: set flip to False, "
            "or the phase's latents to 'off'"
        )


def _check_average(ema_decay: float | None, phases: tuple[Phase, ...]) -> None:
    """Raises ValueError when an average is to begin anew that nothing keeps."""
    fresh = [phase.view for phase in phases if phase.ema == "fresh"]
    if ema_decay is None and fresh:
        raise ValueError(f"phase {fresh[0]!r}: ema is 'fresh', but training.ema_decay None keeps no average: set it")
