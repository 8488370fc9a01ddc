"""Caption → token ids, for the build (which stores ids) and for training (which needs the empty prompt's, the same way)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from .fingerprint import digest_of

CaptionKind = Literal["long", "short", "alt"]
CAPTION_COLUMNS: dict[str, str] = {"long": "caption", "short": "short_caption", "alt": "text"}
"""The column that holds each kind of caption."""

_TOKENIZER_FILES = {
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt"),
    *("chat_template.jinja", "chat_template.json"),
}
# Some templates tell today's date. Ids must not depend on it: they are told the day that Llama 3's falls back to.
_FIXED_DAY = "{% macro strftime_now(form) %}26 Jul 2024{% endmacro %}"
_MARK = "THECAPTION"  # stands for the caption while the template is rendered


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """A language model's tokenizer, which captions it is given, in what words, and how long they may be."""

    name: str
    """Short name, used in column and member names: `t5` gives `tokens_t5`. Letters and digits only."""
    model: str
    """Folder or hub name of the language model (or of its tokenizer)."""
    revision: str | None = None
    """Commit of the hub repository; None is its main branch."""
    subfolder: str = ""
    """Of `model`, where the tokenizer lies: "tokenizer" in a Stable Diffusion repository."""
    max_length: int | Literal["flexible"] = 128
    """Most tokens, those of the template and special ones included; of longer captions the end is cut. ELLA: 128.
    "flexible": as many as the caption has, up to the tokenizer's own limit. Ids are stored without pads in either case."""
    captions: tuple[tuple[CaptionKind, float], ...] = (("long", 1.0),)
    """Kinds of captions and the weights by which training picks one of those that a sample has: "long" and "short" as
    recaptioned, "alt" as the web had it. The first kind's column is `tokens_<name>`, a further one's `tokens_<name>_<kind>`."""
    template: Literal["raw", "chat"] = "raw"
    """The caption as it is, or as the user's words in the tokenizer's chat template, which then asks for the answer, without
    thoughts before it where it knows `enable_thinking` (Qwen3)."""
    instruction: str = ""
    """Words before every caption, as decoder-only language models want them (SANA's "complex human instruction", Lumina's
    system prompt). What stands between them and the caption, a line break say, is part of it."""
    id_type: Literal["uint16", "int32"] = "uint16"
    """How ids are stored; a vocabulary of more than 65,536 (Llama 3, Qwen, Gemma) needs "int32", and loading says so."""

    def __post_init__(self) -> None:
        if not self.name.isalnum():
            raise ValueError(f"a tokenizer's name must be letters and digits, got {self.name!r}")
        if self.max_length != "flexible" and (isinstance(self.max_length, str) or self.max_length < 2):
            raise ValueError(f"max_length must be at least 2, or 'flexible', got {self.max_length!r}")
        kinds = [kind for kind, _ in self.captions]
        if not kinds or len(set(kinds)) < len(kinds) or not set(kinds) <= {*get_args(CaptionKind)}:
            raise ValueError(
                f"tokenizer {self.name!r}: captions must be different ones of long, short, alt, got {kinds}"
            )
        if not all(0 < weight < float("inf") for _, weight in self.captions):
            raise ValueError(f"tokenizer {self.name!r}: the weights of captions must be above 0, got {self.captions}")
        for field, choices in (("template", ("raw", "chat")), ("id_type", ("uint16", "int32"))):
            if getattr(self, field) not in choices:
                raise ValueError(
                    f"tokenizer {self.name!r}: {field} is {getattr(self, field)!r}: choose {' or '.join(choices)}"
                )

    @property
    def columns(self) -> dict[str, str]:
        """The columns of ids, and for each the column of captions that it is made from."""
        kinds = [kind for kind, _ in self.captions]
        return dict(zip(token_columns(self.name, kinds), (CAPTION_COLUMNS[kind] for kind in kinds), strict=True))

    @property
    def space(self) -> str:
        """Names what the ids mean, for `check_stages`: a stage that reads them must have been given the same tokenizer."""
        model = f"{self.model}{'/' * bool(self.subfolder)}{self.subfolder}@{self.revision or 'main'}"
        return f"{model} (max_length {self.max_length}, {self.template}, instruction {self.instruction!r})"


def token_columns(name: str, kinds: Sequence[str]) -> list[str]:
    """What the ids of each kind of caption are called: `tokens_<name>`, and `tokens_<name>_<kind>` after the first."""
    return [f"tokens_{name}_{kind}" if place else f"tokens_{name}" for place, kind in enumerate(kinds)]


def tokenizer_id(model: str, revision: str | None, subfolder: str = "") -> str:
    """What identifies a tokenizer: `name@revision` on a hub, a digest of its files for a local folder."""
    folder = Path(model, subfolder)
    if not Path(model).is_dir():
        return f"{folder.as_posix()}@{revision or 'main'}"
    files = sorted(p for p in folder.iterdir() if p.name in _TOKENIZER_FILES) if folder.is_dir() else []
    if not files:
        raise FileNotFoundError(f"{folder} holds no tokenizer (none of {', '.join(sorted(_TOKENIZER_FILES))})")
    return digest_of(*(part for p in files for part in (p.name, p.read_bytes())))


def prompt_facts(config: TokenizerConfig) -> dict[str, Any]:
    """All that decides which ids a caption becomes, as JSON values."""
    facts: dict[str, Any] = {
        "id": tokenizer_id(config.model, config.revision, config.subfolder),
        "max_length": config.max_length,
        "template": config.template,
        "instruction": config.instruction,
    }
    if config.template == "chat":
        facts["thinking"] = "off"  # templates that know thoughts give other ids than when they were left on
    return facts


def tokenizer_facts(config: TokenizerConfig) -> dict[str, Any]:
    """What a view says of a tokenizer, as JSON values: `prompt_facts`, and `captions` as [kind, weight] pairs."""
    return {**prompt_facts(config), "captions": [[kind, weight] for kind, weight in config.captions]}


def load_tokenizer(config: TokenizerConfig) -> CaptionTokenizer:
    """The tokenizer, from its folder or the hub; never with remote code. Raises ValueError where settings do not fit it."""
    from transformers import AutoTokenizer

    bare = AutoTokenizer.from_pretrained(
        config.model, revision=config.revision, subfolder=config.subfolder, trust_remote_code=False
    )
    return CaptionTokenizer(config, bare)


class CaptionTokenizer:
    """A tokenizer with the words around a caption: captions in, ids of whole prompts out."""

    def __init__(self, config: TokenizerConfig, bare: Any) -> None:
        """`bare` is the tokenizer itself, a transformers one."""
        if not bare.is_fast:
            raise ValueError(f"the tokenizer of {config.model} is of Python alone: it tells no offsets, take another")
        self.config, self.bare = config, bare
        self.id_type = np.dtype(config.id_type)
        highest = max(bare.get_vocab().values())
        if highest > np.iinfo(self.id_type).max:
            raise ValueError(
                f"tokenizer {config.name!r}: ids of {config.model} go up to {highest}: set id_type to 'int32'"
            )
        self.limit = _limit(config, bare)
        """Most tokens of a prompt."""
        self.pad = _pad(config, bare)
        """The id that short prompts are filled up with."""
        self._before, self._after = _around(config, bare)
        self._control = np.zeros(highest + 1, dtype=bool)
        self._control[_control_ids(bare)] = True
        self.prefix_tokens, self._suffix_tokens = self._measure()
        """Tokens before a caption: special ones, the template's and the instruction's."""

    def tokenize(self, captions: Sequence[str]) -> list[np.ndarray]:
        """Ids of each caption's prompt, special tokens included, cut at `limit`, not padded: `id_type` (length,) each.

        They are the tokenizer's own, but for control tokens spelled out in a caption ("</s>", "<|im_end|>"): these are left
        out, for a caption must not end its own prompt. What is cut is the caption's end, never what the template has after it.
        """
        if not captions:
            return []
        flat, lengths = self._whole(captions)
        place = np.arange(len(flat)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        from_end = np.repeat(lengths, lengths) - place
        flat = flat[(place < self.limit - self._suffix_tokens) | (from_end <= self._suffix_tokens)].astype(self.id_type)
        ends = np.cumsum(np.minimum(lengths, self.limit)).tolist()
        # An empty caption is nothing at all where no special token is added, and a language model wants one to read.
        nothing = np.array([self.pad], self.id_type)
        return [flat[start:end] if end > start else nothing for start, end in zip([0, *ends], ends)]

    def tokens_cut(self, captions: Sequence[str]) -> list[int]:
        """How many tokens of each caption's end `tokenize` cuts."""
        return np.maximum(self._whole(captions)[1] - self.limit, 0).tolist() if captions else []

    def _whole(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all captions' prompts in a row, without typed control tokens and not cut, and each prompt's length."""
        found = self._encode(captions)["input_ids"]
        lengths = np.fromiter(map(len, found), np.int64, len(found))
        flat = np.fromiter(chain.from_iterable(found), np.int64, int(lengths.sum()))
        typed = self._typed_control(flat, lengths)
        if typed.any():
            lengths = lengths - np.bincount(_rows(lengths)[typed], minlength=len(lengths))
            flat = flat[~typed]
        return flat, lengths

    def _encode(self, captions: Sequence[str], **wanted: bool) -> Any:
        if self.config.template == "chat":
            captions = [caption.strip() for caption in captions]  # as most chat templates do
        return self.bare(
            [f"{self._before}{caption}{self._after}" for caption in captions],
            add_special_tokens=self.config.template == "raw",  # a chat template has them all
            truncation=False,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
            **wanted,
        )

    def _measure(self) -> tuple[int, int]:
        """Tokens before and after a caption, counted around a short word. Raises ValueError where they leave no room."""
        self._opening = self._closing = 0  # control tokens among them
        found = self._encode(["a"], return_offsets_mapping=True)
        start = len(self._before)
        own = [place for place, (low, high) in enumerate(found["offset_mapping"][0]) if low <= start < high]
        ids = np.asarray(found["input_ids"][0])
        if not own:
            raise ValueError(f"the tokenizer of {self.config.model} gives no token for a letter: is it the right one?")
        prefix, suffix = own[0], len(ids) - 1 - own[-1]
        self._opening = int(self._control[ids[:prefix]].sum())
        self._closing = int(self._control[ids[own[-1] + 1 :]].sum())
        if prefix + suffix >= self.limit:
            raise ValueError(
                f"tokenizer {self.config.name!r}: max_length {self.limit} leaves no room for a caption, as template and "
                f"instruction take {prefix + suffix} tokens: raise it"
            )
        return prefix, suffix

    def _typed_control(self, flat: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Which ids (all prompts' in a row) are control tokens that stood in a caption: all but a prompt's first and last."""
        typed = np.zeros(len(flat), dtype=bool)
        spots = np.flatnonzero(self._control[flat])
        owners = _rows(lengths)[spots]
        counts = np.bincount(owners, minlength=len(lengths))
        nth = np.arange(len(spots)) - (np.cumsum(counts) - counts)[owners]
        typed[spots[(nth >= self._opening) & (nth < counts[owners] - self._closing)]] = True
        return typed


def _rows(lengths: np.ndarray) -> np.ndarray:
    """For ids in a row, of which prompt each is."""
    return np.repeat(np.arange(len(lengths)), lengths)


def _limit(config: TokenizerConfig, bare: Any) -> int:
    if config.max_length != "flexible":
        return config.max_length
    if bare.model_max_length > 1_000_000:  # transformers' way to say that none is known
        raise ValueError(
            f"tokenizer {config.name!r}: {config.model} states no longest prompt, which max_length 'flexible' needs: "
            "give a number"
        )
    return int(bare.model_max_length)


def _pad(config: TokenizerConfig, bare: Any) -> int:
    pad = bare.pad_token_id if bare.pad_token_id is not None else bare.eos_token_id
    if pad is None:
        raise ValueError(f"the tokenizer of {config.model} has neither a pad nor an end token: give it one")
    return int(pad)


def _around(config: TokenizerConfig, bare: Any) -> tuple[str, str]:
    """The text before and after a caption."""
    if config.template == "raw":
        return config.instruction, ""
    if bare.chat_template is None:
        raise ValueError(f"tokenizer {config.name!r}: {config.model} has no chat template: set template to 'raw'")
    asked = [{"role": "user", "content": config.instruction + _MARK}]
    template = _FIXED_DAY + bare.get_chat_template()
    # Templates of models that think (Qwen3) then close the thoughts before they begin; others do not know the word.
    text = bare.apply_chat_template(
        asked, chat_template=template, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    if text.count(_MARK) != 1:
        raise ValueError(
            f"tokenizer {config.name!r}: the chat template of {config.model} does not give the user's words once, as they "
            "are: set template to 'raw'"
        )
    before, after = text.split(_MARK)
    return before, after


def _control_ids(bare: Any) -> list[int]:
    """Ids of the special tokens, but for an unknown word's where it means nothing else."""
    special = {number for number, token in bare.added_tokens_decoder.items() if token.special} | {*bare.all_special_ids}
    others = {bare.bos_token_id, bare.eos_token_id, bare.pad_token_id, bare.sep_token_id, bare.cls_token_id}
    return sorted(special - ({bare.unk_token_id} - others))
