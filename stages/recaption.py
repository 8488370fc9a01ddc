"""image → caption: a long dense caption by a multimodal language model, and a short one beside it where it is asked for.

Which model, and whether it runs here or on servers, is the engine's matter (`captioning/`); what is asked and what counts as
a caption is this stage's. An answer that is none (a refusal, a loop, an echo of the prompt) is a dropped row with its reason
and keeps the model's words, so that they can be looked at.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from pipeline.fingerprint import digest_of, plain
from pipeline.stage import Columns, Needs, Stage

from .captioning.engine import Answer
from .captioning.guards import GuardsConfig, Judged, judge
from .captioning.prompts import TEMPLATES, PromptConfig, Short, choose, hint_from, split_together
from .captioning.with_openai import OpenAIConfig
from .captioning.with_transformers import TransformersConfig
from .captioning.with_vllm import VLLMConfig
from .sentences import split_sentences


@dataclass(frozen=True, kw_only=True)
class RecaptionConfig:
    """Who captions, asked what, and what counts as a caption."""

    engine: TransformersConfig | VLLMConfig | OpenAIConfig
    """The model, and how it is run or reached."""
    prompts: tuple[PromptConfig, ...] = TEMPLATES
    """What the model is asked; with several, each sample's key chooses one by weight, so that captions vary in style."""
    short: Short = "none"
    """Where a short caption comes from, if there is to be one: `asked` for by itself, written `together` with the long one,
    or the long one's `first_sentence`."""
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    """What an answer must be to count as a caption, and what is mended about it."""
    batch_size: int = 512
    """Pictures handed to the engine at a time, which makes its own batches of them: several, so that it never waits."""
    needs: Needs = field(default_factory=lambda: Needs(cpus=2.0, gpus=1.0, memory_gb=16))
    """What an actor takes."""

    def __post_init__(self) -> None:
        names = [p.name for p in self.prompts]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"recaption needs at least one prompt, each of another name, got {names}")
        if isinstance(self.engine, OpenAIConfig) and self.needs.gpus:
            raise ValueError("recaption: the openai engine's GPUs are its servers': set needs=Needs(gpus=0)")
        if isinstance(self.engine, VLLMConfig) and self.needs.gpus < self.engine.tensor_parallel_size:
            raise ValueError(
                f"recaption: tensor_parallel_size {self.engine.tensor_parallel_size} needs as many GPUs, "
                f"but needs.gpus is {self.needs.gpus:g}"
            )


class Recaption(Stage):
    """Reads image (and the alt text, where a prompt has a hint); writes the captions, which prompt they answer and whether
    with a hint, the long one's tokens, why it ended and what was mended about it (comma separated; null for nothing).
    """

    name = "recaption"
    writes = pa.schema(
        [
            ("caption", pa.string()),
            ("short_caption", pa.string()),
            ("prompt", pa.string()),
            ("hinted", pa.bool_()),
            ("caption_tokens", pa.int32()),
            ("finish", pa.string()),
            ("mended", pa.string()),
        ]
    )
    config: RecaptionConfig

    def __init__(self, config: RecaptionConfig) -> None:
        super().__init__(config)
        self.reads = ("image", "text") if any(p.hint for p in config.prompts) else ("image",)

    def identity(self) -> Any:
        """The settings, of the engine's only those that captions depend on."""
        config = self.config
        unasked = frozenset() if config.short == "asked" else frozenset({"short"})
        return {
            "engine": config.engine.identity(),
            "prompts": [plain(p, unasked) for p in config.prompts],
            "short": config.short,
            "guards": plain(config.guards),
        }

    def load(self) -> None:
        """Loads the engine, and what tells languages apart where a language is asked for."""
        self._language = self.config.guards.load_language()
        self._engine = self.config.engine.load()

    def process(self, batch: pa.Table) -> Columns:
        """Captions the batch's pictures."""
        keys, images = batch.column("key").to_pylist(), batch.column("image").to_pylist()
        asked = [choose(self.config.prompts, key) for key in keys]
        hints = [""] * len(keys)
        if "text" in self.reads:
            alts = batch.column("text").to_pylist()
            hints = [hint_from(alt) if prompt.hint else "" for prompt, alt in zip(asked, alts, strict=True)]
        prompts = [[prompt.ask(hint, self.config.short)] for prompt, hint in zip(asked, hints, strict=True)]
        if self.config.short == "asked":
            prompts = [[*long, prompt.short] for long, prompt in zip(prompts, asked, strict=True)]
        each = len(prompts[0]) if prompts else 1
        answers = self._engine.captions(
            [image for image in images for _ in range(each)],
            [text for texts in prompts for text in texts],
            [_seed(key, n) for key in keys for n in range(each)],
        )
        rows = [
            {**self._row(prompt, answers[n * each : (n + 1) * each]), "prompt": prompt.name, "hinted": bool(hint)}
            for n, (prompt, hint) in enumerate(zip(asked, hints, strict=True))
        ]
        return {name: [row[name] for row in rows] for name in (*self.writes.names, "status", "reason", "transient")}

    def _row(self, prompt: PromptConfig, answers: list[Answer]) -> dict[str, Any]:
        long = answers[0]
        row: dict[str, Any] = {"caption_tokens": long.tokens, "finish": long.finish, "transient": long.transient}
        if long.status != "kept":
            nothing = {"caption": None, "short_caption": None, "mended": None}
            return {**row, **nothing, "status": long.status, "reason": long.reason}
        text, line = split_together(long.text) if self.config.short == "together" else (long.text, None)
        judged = judge(text, long.finish, self.config.guards, prompt.own_words(self.config.short), self._language)
        short = None if judged.reason else self._short(prompt, judged, answers[-1], line)
        return {
            **row,
            "caption": judged.caption,
            "short_caption": short,
            "mended": ",".join(judged.mended) or None,
            "status": "dropped" if judged.reason else "kept",
            "reason": judged.reason,
        }

    def _short(self, prompt: PromptConfig, long: Judged, last: Answer, line: str | None) -> str | None:
        """The short caption; None where there is none to be had. The row stands without."""
        if self.config.short == "none":
            return None
        if self.config.short == "first_sentence":
            return split_sentences(long.caption)[0]
        text, finish = (last.text, last.finish) if self.config.short == "asked" else (line or "", None)
        guards = replace(self.config.guards, min_words=1)
        judged = judge(text, finish, guards, prompt.own_words(self.config.short), self._language)
        return None if judged.reason else judged.caption


def _seed(key: str, number: int) -> int:
    """32 bits for the answer of this number to the sample's questions."""
    return int(digest_of("caption", key, str(number))[:8], 16)
