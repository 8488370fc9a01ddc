"""Caption upsampling: an optional language model makes dense prompts of short ones, in context, before they are encoded.

Connectors are trained on dense captions, and people write short prompts (Betker et al. 2023, "Improving image generation with
better captions", section 3.5, upsample with GPT-4; ELLA's README does so by hand).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from pipeline.captions import CaptionTokenizer, TokenizerConfig, load_tokenizer
from pipeline.quantization import quantization_of

INSTRUCTION = """You write prompts for a text-to-image model. Rewrite the short prompt as one dense paragraph of 50 to 80 words. \
Keep every object, number, colour, place and word to be written that it names. Say what each thing looks like, where it stands, \
and what light and background there are. Write the paragraph alone.

Short: a cat on a sofa
Detailed: A fluffy orange tabby cat lies curled up on a grey linen sofa, its white paws tucked under its chest and its green \
eyes half closed. A knitted cream blanket hangs over the armrest on the left, and a small round cushion leans beside the cat. \
Soft morning light falls through a window on the right onto the wooden floor; the wall behind is plain and pale.

Short: two red apples and a green pear, oil painting
Detailed: An oil painting of two red apples and one green pear on a dark wooden table. The apples stand side by side on the \
left, their skins glossy with a yellow patch near the stem; the pear lies on its side to the right, its stem towards the \
viewer. Warm light from the upper left gives each fruit a deep brown shadow, and thick brush strokes show in the plain \
olive background.

Short: """
"""What the model is told before the prompt, with examples."""

ASK = "\nDetailed:"
"""What stands behind the prompt."""

LEAST = 12
"""Words of the shortest answer that is taken for a dense prompt."""
_OPENING = re.compile(
    r"[\W_]*((sure|certainly|of course|here(['’]s| is| are))\b[^:\n]{0,80}"
    r"|((the|your|a|detailed|dense|rewritten|expanded)\s+)*(detailed|prompt|paragraph|description|caption))[*_ ]*:[*_\s]*",
    re.IGNORECASE,
)
"""What announces a prompt and is none of it: "Here is the rewritten prompt:", "**Detailed:**"."""


@dataclass(frozen=True, kw_only=True)
class UpsamplerConfig:
    """Which language model expands prompts, and how."""

    model: str
    """Folder or hub name of a decoder-only language model; small instruction-tuned ones do."""
    revision: str | None = None
    """Revision on the hub; pin it."""
    instruction: str = INSTRUCTION
    """What it is told, examples included; the prompt follows, and then the word "Detailed:"."""
    words: int = 25
    """Prompts of more words are dense enough and stay as they are."""
    max_new_tokens: int = 160
    """Longest expansion, in the model's tokens; the connector reads 128 of its own."""
    dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16"
    """Of the weights."""
    quantize: Literal["none", "8bit", "4bit"] = "none"
    """Weights of 8 or 4 bits (extra `quantization`); a GPU is needed."""

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("upsampler.model is empty: name a folder or a model on the hub")
        if self.words < 1 or self.max_new_tokens < 1:
            raise ValueError(
                f"upsampler: words {self.words} and max_new_tokens {self.max_new_tokens} must be at least 1"
            )
        if self.dtype not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"upsampler.dtype is {self.dtype!r}: choose float32, float16 or bfloat16")
        if self.quantize not in ("none", "8bit", "4bit"):
            raise ValueError(f"upsampler.quantize is {self.quantize!r}: choose 'none', '8bit' or '4bit'")

    def load(self) -> Upsampler:
        """Tokenizer and model, on the CPU (with few bits, on the GPU). Raises OSError or ValueError that says what is missing."""
        from transformers import AutoConfig, AutoModelForCausalLM

        if getattr(AutoConfig.from_pretrained(self.model, revision=self.revision), "is_encoder_decoder", False):
            raise ValueError(f"upsampler.model {self.model} has an encoder: name a decoder-only language model")
        quantization = quantization_of(self.quantize, self.dtype, "upsampler.quantize")
        module = AutoModelForCausalLM.from_pretrained(
            self.model,
            revision=self.revision,
            dtype=getattr(torch, self.dtype),
            use_safetensors=True,
            quantization_config=quantization,
            device_map=None if quantization is None else {"": torch.cuda.current_device()},
        )
        raw = TokenizerConfig(
            name="upsampler",
            model=self.model,
            revision=self.revision,
            max_length=4096,
            instruction=self.instruction,
            id_type="int32",
        )
        tokenizer = load_tokenizer(raw)
        if tokenizer.bare.chat_template is not None:
            tokenizer = CaptionTokenizer(replace(raw, template="chat"), tokenizer.bare)
        return Upsampler(self, tokenizer, module.eval().requires_grad_(False))


class Upsampler:
    """A decoder-only language model that expands prompts, greedily: the same prompt always becomes the same."""

    def __init__(self, config: UpsamplerConfig, tokenizer: CaptionTokenizer, module: Any) -> None:
        self.config, self.tokenizer, self.module = config, tokenizer, module

    def to(self, device: torch.device | str) -> Upsampler:
        """Moves the weights; returns itself."""
        if self.config.quantize == "none":  # weights of few bits lie where they were loaded
            self.module.to(device)
        return self

    def expand(self, prompts: Sequence[str]) -> list[str]:
        """Each prompt made dense, or as it was where it is dense already or empty, or where nothing sensible came, which is
        printed.
        """
        found: dict[str, str] = {}
        for prompt in dict.fromkeys(prompts):
            found[prompt] = prompt
            if 0 < len(prompt.split()) <= self.config.words:
                text, whole = self._answer(prompt)
                expanded = one_paragraph(text, whole)
                problem = problem_of(expanded, prompt)
                if problem:
                    print(f"the prompt {prompt!r} stays as it is: its expansion {problem}", flush=True)
                else:
                    found[prompt] = expanded
        return [found[prompt] for prompt in prompts]

    @torch.inference_mode()
    def _answer(self, prompt: str) -> tuple[str, bool]:
        """What the model writes, and whether it came to an end by itself. One prompt at a time: pads would change it."""
        (ids,) = self.tokenizer.tokenize([" ".join(prompt.split()) + ASK])
        given = torch.from_numpy(ids.astype(np.int64))[None].to(self.module.device)
        made = self.module.generate(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            do_sample=False,
            max_new_tokens=self.config.max_new_tokens,
            pad_token_id=self.tokenizer.pad,
        )[0, given.shape[1] :]
        ends = self.module.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        text = self.tokenizer.bare.decode(made, skip_special_tokens=True)
        return text, int(made[-1]) in ends


def one_paragraph(text: str, whole: bool) -> str:
    """The first paragraph of an answer on one line; where the answer was cut within it, up to its last whole sentence. Thoughts
    before it and what only announces it (a label, a line or paragraph that ends in ":") are left out.
    """
    _, _, text = text.rpartition("</think>")
    if text.lstrip().startswith("<think>"):  # the answer was cut before its thoughts came to an end
        return ""
    first, _, rest = text.strip().partition("\n")
    text = rest if rest.strip() and first.rstrip("*_ ").endswith(":") else text
    opening = _OPENING.match(text)
    paragraph, *more = re.split(r"\n\s*\n", text[opening.end() if opening else 0 :].strip())
    paragraph, *examples = re.split(r"\n\s*Short:", paragraph)  # a base model goes on with examples of its own
    line = " ".join(paragraph.split()).strip('"')
    if whole or more or examples:
        return line
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s|$)", line)]
    return line[: ends[-1]] if ends else ""


def problem_of(expanded: str, prompt: str) -> str | None:
    """What is wrong with an expansion, or None."""
    words = expanded.casefold().split()
    if not words:
        return "is empty"
    if len(words) <= len(prompt.split()):
        return "is no longer than it"
    if len(words) < LEAST:
        return f"has {len(words)} words, of at least {LEAST}"
    runs = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    if runs and len(set(runs)) < 0.7 * len(runs):
        return "loops"
    return None
