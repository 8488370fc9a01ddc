"""Small tokenizers of the real classes, made on the spot: each family that a language model may bring."""

from __future__ import annotations

from pathlib import Path

from tokenizers import normalizers
from transformers import BertTokenizer, CLIPTokenizer, GemmaTokenizer, LlamaTokenizer, Qwen2Tokenizer, T5Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

WORDS = ["a", "red", "green", "circle", "left", "of", "the", "square", "big", "user", "Describe"]
MARKS = [".", ",", ":", "<", ">", "|", "/", "_", "[", "]", "s", "!"]
BYTES = [f"<0x{number:02X}>" for number in range(256)]

ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CHATML = (
    "<|im_start|>system\nToday is {{ strftime_now('%d %b %Y') }}.<|im_end|>\n"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' + message['role'] + '\n' + message['content'] | trim"
    " + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def _merged(start: list[str], words: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A BPE vocabulary in which each of the words is one token, and the merges that make it so."""
    merges: dict[tuple[str, str], None] = {}
    tokens = dict.fromkeys([*start, *(letter for word in words for letter in word)])
    for word in words:
        for end in range(1, len(word)):
            merges[(word[:end], word[end])] = None
            tokens[word[: end + 1]] = None
    return {token: number for number, token in enumerate(tokens)}, list(merges)


def t5() -> T5Tokenizer:
    """Unigram pieces."""
    known = [("▁" + word, -2.0) for word in WORDS] + [(letter, -9.0) for letter in sorted(set("".join(WORDS)))]
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        *known,
        ("▁", -4.0),
        *((mark, -8.5) for mark in MARKS[:-2]),
    ]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=4, model_max_length=512)
    tokenizer.backend_tokenizer.normalizer = (
        normalizers.NFKC()
    )  # T5's own is much the same, and kept where it is loaded
    return tokenizer


def llama() -> LlamaTokenizer:
    """BPE with bytes for what it does not know, as TinyLlama's, with Zephyr's template."""
    vocab, merges = _merged(["<unk>", "<s>", "</s>", *BYTES, "▁", "\n", *MARKS], ["▁" + word for word in WORDS])
    return LlamaTokenizer(vocab=vocab, merges=merges, chat_template=ZEPHYR, model_max_length=2048, add_bos_token=True)


def gemma() -> GemmaTokenizer:
    """BPE without a first space; line breaks are tokens that anybody may write."""
    start = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *BYTES, "▁", "\n", "\n\n", *MARKS]
    vocab, merges = _merged(start, [*WORDS, *("▁" + word for word in WORDS)])
    turns = ["<start_of_turn>", "<end_of_turn>"]
    return GemmaTokenizer(
        vocab=vocab, merges=merges, chat_template=GEMMA, additional_special_tokens=turns, add_bos_token=True
    )


def qwen2() -> Qwen2Tokenizer:
    """Byte-level BPE without any special token of its own around a text."""
    vocab, merges = _merged(sorted(bytes_to_unicode().values()), [*WORDS, *("Ġ" + word for word in WORDS)])
    vocab |= {"<|endoftext|>": len(vocab)}
    marks = ["<|im_start|>", "<|im_end|>"]
    return Qwen2Tokenizer(
        vocab=vocab, merges=merges, chat_template=CHATML, additional_special_tokens=marks, model_max_length=32768
    )


def clip() -> CLIPTokenizer:
    """Byte-level BPE with ends of words; its unknown, pad and end tokens are one."""
    letters = sorted(bytes_to_unicode().values())
    words = [word.lower() for word in WORDS if len(word) > 1]
    merges = [pair for word in words for pair in _clip_merges(word)]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    tokens = list(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))
    return CLIPTokenizer(vocab={t: n for n, t in enumerate(tokens)}, merges=merges, model_max_length=77)


def _clip_merges(word: str) -> list[tuple[str, str]]:
    parts = [*word[:-1], word[-1] + "</w>"]
    return [("".join(parts[:end]), parts[end]) for end in range(1, len(parts))]


def bert() -> BertTokenizer:
    """Word pieces; what it does not know becomes [UNK]."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(word.lower() for word in WORDS), *MARKS]
    tokens += ["##" + letter for letter in "abcdefghijklmnopqrstuvwxyz"]
    vocab = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return BertTokenizer(vocab=vocab, model_max_length=512)


FAMILIES = {"t5": t5, "llama": llama, "gemma": gemma, "qwen2": qwen2, "clip": clip, "bert": bert}
CHATS = ("llama", "gemma", "qwen2")
TYPED = {
    "t5": ["</s>", "<pad>", "<extra_id_2>"],
    "llama": ["</s>", "<s>"],
    "gemma": ["<eos>", "<bos>", "<end_of_turn>", "<start_of_turn>"],
    "qwen2": ["<|im_end|>", "<|im_start|>", "<|endoftext|>"],
    "clip": ["<|endoftext|>", "<|startoftext|>"],
    "bert": ["[SEP]", "[CLS]", "[MASK]", "[PAD]"],
}
"""What a hostile caption spells."""


def save_families(folder: Path) -> None:
    """Each family's tokenizer in a folder of its name."""
    for name, make in FAMILIES.items():
        make().save_pretrained(folder / name)
