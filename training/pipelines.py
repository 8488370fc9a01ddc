"""Any diffusers pipeline draws through a bridge, and keeps its own code.

    attached = attach(pipeline, language_model=language_model, bridge=bridge)
    pipeline(**attached.encode(["a dense prompt"], negative="blurry"), image=..., num_inference_steps=50)

The embeddings that the pipeline is given hold what the language model made of the prompts, which it reads once. Hooks before
the pipeline's networks (U-Net or transformer, and ControlNets) turn them into the connector's tokens, at each call with that
call's timestep. What the pipeline does with embeddings on the way (guidance, several pictures a prompt, a step callback)
stays its own, and so do its scheduler, img2img, inpainting, IP-Adapters, and a LoRA of the user's on the network.

Stable Diffusion's pipelines take no mask, so the last column of the embeddings tells of each row whether it is seen, and whose
it is. Pipelines hold embeddings in the network's dtype: hidden states are rounded to it before the connector reads them.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from .bridge import Bridge, Conditioning
from .configuration import check_connector
from .denoisers.sdxl import SIZES
from .generation import on_device
from .language_models import LanguageModel
from .lora import keep_active, layers_with

HIDDEN, SEEN, BESIDE_HIDDEN, BESIDE_SEEN = 0.0, 1.0, 2.0, 3.0
"""What the last column says of a row: the language model's, or that of the text encoder beside it; to be seen or not."""


def attach(
    pipeline: Any,
    *,
    language_model: LanguageModel,
    bridge: Bridge,
    beside: LanguageModel | None = None,
    offload: bool = False,
) -> Attached:
    """Puts hooks on the networks of a diffusers pipeline. Its own text encoders are not asked any more: load it without.

    A bridge with a LoRA in the denoiser wants that very network in the pipeline. LoRA of the user's are heard beside it; a
    `scale` in cross_attention_kwargs scales them all, the weights of `set_adapters` the user's.
    The text models and the bridge follow the pipeline to its device; with `offload` the text models are there only while
    they read. Raises ValueError in one line where the bridge does not fit, or where another is attached already.
    """
    check_connector(bridge.config, language_model.config)
    if bridge.config.in_width != language_model.width:
        raise ValueError(
            f"{bridge.config.kind}.in_width is {bridge.config.in_width}, {language_model.config.model} gives "
            f"{language_model.width}: use the language model it was trained with"
        )
    networks = [module for module in pipeline.components.values() if _is_network(module)]
    if not networks:
        raise ValueError(
            f"{type(pipeline).__name__} has no network that is told of text and timestep: nothing to attach to"
        )
    for network in networks:
        _check_free(network)
        _check_fit(network, bridge, beside)
    _check_lora(networks, bridge)
    return Attached(pipeline, networks, language_model, bridge, beside, offload)


class Attached:
    """A pipeline under its hooks, until `detach` or the end of a `with` block."""

    def __init__(
        self,
        pipeline: Any,
        networks: list[Any],
        language_model: LanguageModel,
        bridge: Bridge,
        beside: LanguageModel | None,
        offload: bool,
    ) -> None:
        """As `attach`, which checks that all fits."""
        self.pipeline, self.language_model, self.bridge, self.beside = pipeline, language_model, bridge, beside
        self.networks, self.offload = networks, offload
        config = bridge.config
        self.columns = max(config.layers * config.in_width, beside.width if beside else 0) + 1
        """Of the embeddings."""
        self._read: Any = WeakIdKeyDictionary()
        self._handles = [handle for network in networks for handle in _Hook(self, network).register()]

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    def detach(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def encode(self, prompts: str | Sequence[str], negative: str | Sequence[str] = "") -> dict[str, Any]:
        """Keyword arguments for the pipeline's call that stand for the prompts, and for what guidance is against (one for all,
        or one a prompt); none of the latter for a pipeline that knows no such thing (SANA-Sprint). Raises ValueError where it is
        given one nevertheless, numbers do not match, or values are too large for the pipeline's dtype.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        negatives = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
        if len(negatives) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts and {len(negatives)} negative ones: give one, or one for each")
        _check_lora(self.networks, self.bridge)  # unload_lora_weights takes out all there are
        asks = _asks(self.pipeline)
        sides = [("", prompts)]
        if "negative_prompt_embeds" in asks:
            sides.append(("negative_", negatives))
        elif any(negatives):
            raise ValueError(f"{type(self.pipeline).__name__} takes no negative prompt: leave it out")
        texts = list(dict.fromkeys(text for _, wanted in sides for text in wanted))  # the empty prompt is read once
        device = self.pipeline._execution_device
        self.place(device)
        with on_device((self.language_model, self.beside), device, self.offload):
            embeddings = self._embeddings(texts)
        # Where it is "" by default (PixArt, SANA) pipelines refuse it beside embeddings.
        found: dict[str, Any] = {"negative_prompt": None} if len(sides) > 1 else {}
        for prefix, wanted in sides:
            rows = embeddings[[texts.index(text) for text in wanted]]
            found[f"{prefix}prompt_embeds"] = rows
            if "prompt_attention_mask" in asks:
                found[f"{prefix}prompt_attention_mask"] = torch.ones(rows.shape[:2], dtype=torch.long, device=device)
            if "pooled_prompt_embeds" in asks:  # the hook pools what the connector makes
                found[f"{prefix}pooled_prompt_embeds"] = rows.new_zeros(len(rows), self.bridge.config.pooled_width or 0)
        return found

    def place(self, device: torch.device) -> None:
        """Moves the bridge, but for its LoRA, which goes where the models go that it lies in."""
        with torch.inference_mode(False):  # weights moved in inference mode could not be trained afterwards
            for part in (self.bridge.connector, self.bridge.layers, self.bridge.pool):
                if part is not None:
                    part.to(device)

    def told(self, embeddings: torch.Tensor, timestep: torch.Tensor | float) -> Conditioning:
        """embeddings (B, rows, columns) as `encode` made them, timestep () or (B,) -> what the network is to be told.

        What does not depend on the timestep is computed once for an embeddings tensor, and again if it was changed.
        """
        if embeddings.shape[-1] != self.columns:
            raise ValueError(
                f"the pipeline came with text of width {embeddings.shape[-1]}, not with what the connector reads: call it "
                "with **attached.encode(prompts) in place of a prompt"
            )
        version = None if embeddings.is_inference() else embeddings._version
        if embeddings not in self._read or self._read[embeddings][0] != version:
            self.place(embeddings.device)
            self._read[embeddings] = (version, *self._unpacked(embeddings))
        _, text, mask, other = self._read[embeddings]
        times = torch.as_tensor(timestep, device=embeddings.device).reshape(-1).expand(len(embeddings))
        return self.bridge.at(text, mask, times, other)

    def _embeddings(self, texts: list[str]) -> torch.Tensor:
        """One a text: (B, rows, columns) in the pipeline's dtype."""
        hidden, mask = self.language_model.encode(self.language_model.tokenize(texts), appended=self.bridge.appended)
        if hidden.ndim == 4:  # (B, layers, L, W) of all layers: side by side
            hidden = hidden.transpose(1, 2).flatten(2)
        parts = [_marked(hidden, mask, HIDDEN, SEEN, self.columns)]
        if self.beside:
            found = self.beside.encode(self.beside.tokenize(texts))
            parts.append(_marked(*found, BESIDE_HIDDEN, BESIDE_SEEN, self.columns))
        dtype = _bare(self.networks[0]).dtype
        embeddings = torch.cat([part.float() for part in parts], dim=1).to(dtype)
        if not bool(embeddings.isfinite().all()):
            raise ValueError(
                f"hidden states of {self.language_model.config.model} are too large for {dtype}: load the pipeline in "
                "torch.bfloat16 or torch.float32"
            )
        return embeddings

    def _unpacked(self, embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Conditioning | None]:
        """What the bridge reads from embeddings, its mask (B, L), and the tokens beside."""
        config = self.bridge.config
        marks = embeddings[..., -1].round()
        count = int((marks[0] <= SEEN).sum())
        hidden = embeddings[:, :count, : config.layers * config.in_width]
        if config.layers > 1:
            hidden = hidden.unflatten(-1, (config.layers, config.in_width)).transpose(1, 2)
        mask = marks[:, :count] == SEEN
        text, other = self.bridge.read(hidden, mask), None
        if self.beside:
            other = Conditioning(embeddings[:, count:, : self.beside.width], marks[:, count:] == BESIDE_SEEN)
        return text, mask, other


class _Hook:
    """Before each call of one network: embeddings out, the connector's tokens in."""

    def __init__(self, attached: Attached, network: Any) -> None:
        self.attached, self.network = attached, network
        self.signature = inspect.signature(type(_bare(network)).forward)
        facts = getattr(_bare(network), "config", {})  # several ControlNets as one have none
        self.scale = float(facts.get("timestep_scale") or 1.0)  # SANA's network is told other times than its scheduler
        self.lora = layers_with(_bare(network), _lora_of(attached.bridge))
        self.mask: torch.Tensor | None = None

    def register(self) -> list[Any]:
        """Puts it on; handles that take it off."""
        from diffusers.models.transformers.transformer_2d import Transformer2DModel

        handles = [self.network.register_forward_pre_hook(self.before, with_kwargs=True)]
        if "encoder_attention_mask" not in self.signature.parameters:  # ControlNets: only what is in them takes a mask
            handles += [
                module.register_forward_pre_hook(self.before_attention, with_kwargs=True)
                for module in self.network.modules()
                if isinstance(module, Transformer2DModel)
            ]
        return handles

    def before(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Arguments of the network's call -> the same with tokens, mask and pooled text."""
        call = self.signature.bind(network, *args, **kwargs)
        given = call.arguments
        embeddings = given["encoder_hidden_states"]
        told = self.attached.told(embeddings, given["timestep"] / self.scale)
        given["encoder_hidden_states"] = told.tokens.to(embeddings.dtype)
        self.mask = told.mask
        keep_active(self.lora)
        if "encoder_attention_mask" in self.signature.parameters:
            given["encoder_attention_mask"] = told.mask
        if told.pooled is not None:
            given["added_cond_kwargs"] = {
                **(given.get("added_cond_kwargs") or {}),
                "text_embeds": told.pooled.to(embeddings.dtype),
            }
        return call.args[1:], call.kwargs

    def before_attention(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Arguments of a transformer block's call in a network that takes no mask itself -> the same with the mask."""
        return args, {**kwargs, "encoder_attention_mask": self.mask}


def _marked(hidden: torch.Tensor, mask: torch.Tensor, unseen: float, seen: float, columns: int) -> torch.Tensor:
    """hidden (B, L, W), mask (B, L) -> (B, L, columns): filled up with zeros, the mark last."""
    filled = nn.functional.pad(hidden, (0, columns - 1 - hidden.shape[-1]))
    marks = torch.where(mask, seen, unseen).to(hidden.dtype)
    return torch.cat([filled, marks[..., None]], dim=-1)


def _asks(pipeline: Any) -> set[str]:
    """Names of what the pipeline's call takes, by its own class and those it is made from."""
    calls = [vars(kind)["__call__"] for kind in type(pipeline).__mro__ if "__call__" in vars(kind)]
    return {name for call in calls for name in inspect.signature(call).parameters}


def _bare(network: Any) -> Any:
    """The network itself, where it was compiled."""
    return getattr(network, "_orig_mod", network)


def _is_network(module: Any) -> bool:
    """Whether it is told of text and timestep."""
    if not isinstance(module, nn.Module):
        return False
    return {"encoder_hidden_states", "timestep"} <= inspect.signature(type(_bare(module)).forward).parameters.keys()


def _lora_of(bridge: Bridge) -> list[nn.Parameter]:
    return [*getattr(bridge, "denoiser_lora", nn.ModuleDict()).parameters()]


def _check_lora(networks: list[Any], bridge: Bridge) -> None:
    """Raises ValueError where the bridge's LoRA is not in the networks."""
    there = {id(parameter) for network in networks for parameter in network.parameters()}
    if not {*map(id, _lora_of(bridge))} <= there:
        raise ValueError(
            "the bridge has a LoRA in its denoiser, which is not in the pipeline's network: make the pipeline with "
            "unet=denoiser.network (or transformer=), and take out a LoRA of your own with delete_adapters"
        )


def _check_free(network: Any) -> None:
    """Raises ValueError where hooks are on the network already: a second bridge would read the first one's tokens."""
    for module in (network, _bare(network)):
        if any(isinstance(getattr(hook, "__self__", None), _Hook) for hook in module._forward_pre_hooks.values()):
            raise ValueError(
                f"a bridge is attached to this {type(_bare(network)).__name__} already: call its detach() first"
            )


def _check_fit(network: Any, bridge: Bridge, beside: LanguageModel | None) -> None:
    """Raises ValueError where the bridge's tokens are not what the network takes."""
    bare = _bare(network)
    for part in getattr(bare, "nets", [bare]):  # several ControlNets come as one
        facts, name = part.config, type(part).__name__
        width = facts.get("caption_channels") or facts.get("cross_attention_dim")
        pooled = None
        if facts.get("addition_embed_type") == "text_time":
            pooled = facts["projection_class_embeddings_input_dim"] - SIZES * facts["addition_time_embed_dim"]
        given = [("width", width, bridge.config.width), ("pooled_width", pooled, bridge.config.pooled_width)]
        given += [("width beside", width, beside.width)] if beside else []
        for what, wanted, found in given:
            if wanted != found:
                raise ValueError(
                    f"the pipeline's {name} takes text of {what} {wanted}, the bridge gives {found}: take another of them"
                )
