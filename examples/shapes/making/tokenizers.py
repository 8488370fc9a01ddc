"""The world's tokenizers, in the classes that real models use: byte-level BPE for CLIP, unigram pieces for T5 and LLaVA."""

from __future__ import annotations

import json
import string

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPTokenizer, PreTrainedTokenizerFast, T5TokenizerFast

from ..words import PROMPTS, vocabulary

_OTHER = [c for c in string.printable if not c.isspace()]


def clip_tokenizer() -> CLIPTokenizer:
    """Byte-level BPE in which every word of the world is one token; 77 positions, as OpenAI's."""
    words = sorted({word.lower() for word in vocabulary()})
    raw = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False, False)])
    trainer = trainers.BpeTrainer(
        vocab_size=5000,
        min_frequency=0,
        end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([" ".join(words)] * 3, trainer)
    model = json.loads(raw.to_str())["model"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    tokens = [
        "<|startoftext|>",
        "<|endoftext|>",
        *alphabet,
        *(a + "</w>" for a in alphabet),
        *("".join(m) for m in merges),
    ]
    tokens = list(dict.fromkeys(tokens))
    tokenizer = CLIPTokenizer(
        vocab={t: i for i, t in enumerate(tokens)}, merges=merges, model_max_length=77, pad_token="<|endoftext|>"
    )
    split = [w for w in words if len(tokenizer(w).input_ids) != 3]
    if split:
        raise RuntimeError(f"words that are not one CLIP token: {split}")
    return tokenizer


def _pieces() -> list[tuple[str, float]]:
    words = [w for w in vocabulary() if w.isalpha()]
    marks = [w for w in vocabulary() if not w.isalpha()]
    known = [("▁" + w, -2.0) for w in words] + [(m, -2.0) for m in marks] + [("▁", -4.0)]
    return known + [(c, -12.0) for c in _OTHER if c not in marks]


def t5_tokenizer() -> T5TokenizerFast:
    """Unigram pieces, one a word, with T5's special tokens (pad 0, </s> 1, <unk> 2) and 8 sentinels."""
    return T5TokenizerFast(
        vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *_pieces()], extra_ids=8, model_max_length=128
    )


def llava_tokenizer() -> PreTrainedTokenizerFast:
    """The same pieces with LLaMA's special tokens, left padding and `<image>`."""
    special = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("<pad>", 0.0), ("<image>", 0.0)]
    after_newline = [("\n", -2.0), *((prompt.split()[0], -2.0) for prompt in PROMPTS)]
    raw = Tokenizer(models.Unigram([*special, *_pieces(), *after_newline], unk_id=0))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        model_max_length=512,
    )
