"""Caption → token ids, for the build (which stores ids) and for training (which needs the empty prompt's, the same way)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .fingerprint import digest_of

_TOKENIZER_FILES = {
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt"),
}


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """A language model's tokenizer and how long a caption may be."""

    name: str
    """Short name, used in column and member names: `t5` gives `tokens_t5`. Letters and digits only."""
    model: str
    """Folder or hub name of the language model (or of its tokenizer)."""
    revision: str | None = None
    """Commit of the hub repository; None is its main branch."""
    max_length: int = 128
    """Most tokens, special tokens included; longer captions are cut. ELLA: 128."""
    captions: tuple[tuple[Literal["long", "short", "alt"], float], ...] = (("long", 1.0),)
    """Which captions are tokenized, and with what weight training draws each. The first listed is the one that every sample
    has; of `alt` only what the picture supports goes into the shards."""

    def __post_init__(self) -> None:
        if not self.name.isalnum():
            raise ValueError(f"a tokenizer's name must be letters and digits, got {self.name!r}")
        if self.max_length < 2:
            raise ValueError(f"max_length must be at least 2, got {self.max_length}")


def tokenizer_id(model: str, revision: str | None) -> str:
    """What identifies a tokenizer: `name@revision` on a hub, a digest of its files for a local folder."""
    folder = Path(model)
    if not folder.is_dir():
        return f"{model}@{revision or 'main'}"
    files = sorted(p for p in folder.iterdir() if p.name in _TOKENIZER_FILES)
    if not files:
        raise FileNotFoundError(f"{folder} holds no tokenizer (none of {', '.join(sorted(_TOKENIZER_FILES))})")
    return digest_of(*(part for p in files for part in (p.name, p.read_bytes())))


def load_tokenizer(config: TokenizerConfig) -> Any:
    """The tokenizer, from its folder or the hub; never with remote code."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(config.model, revision=config.revision, trust_remote_code=False)


def tokenize(tokenizer: Any, captions: Sequence[str], max_length: int) -> list[np.ndarray]:
    """Token ids of each caption with its special tokens, cut at max_length, not padded: int32 (length,)."""
    if not captions:
        return []
    encoded = tokenizer(list(captions), truncation=True, max_length=max_length, add_special_tokens=True)
    return [np.asarray(ids, np.int32) for ids in encoded["input_ids"]]
