"""Captions to ids: the tokenizers' own, for every family; cut where it harms least, and never ended by a caption's own words."""

from __future__ import annotations

import shutil
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.captions import (
    CaptionTokenizer,
    TokenizerConfig,
    load_tokenizer,
    prompt_facts,
    token_columns,
    tokenizer_facts,
    tokenizer_id,
)
from tests.tokenizer_families import CHATS, FAMILIES, TYPED, WORDS, qwen2, save_families, t5

PLAIN = [
    "a red circle left of the green square.",
    "the big square",
    "",
    "a " * 300,
    "a 🦊 red 🟥, no word: xylophone",
    "红色",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers")
    save_families(folder)
    return folder


def load(folder: Path, family: str, **changes: Any) -> CaptionTokenizer:
    return load_tokenizer(TokenizerConfig(**{"name": family, "model": str(folder / family), **changes}))


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_the_tokenizers_own(folder: Path, family: str) -> None:
    tokenizer = load(folder, family, max_length=32)
    ids = tokenizer.tokenize(PLAIN)
    expected = tokenizer.bare(PLAIN, truncation=True, max_length=32)["input_ids"]
    expected = [own or [tokenizer.bare.pad_token_id] for own in expected]  # only Qwen's empty caption is nothing at all
    assert [one.tolist() for one in ids] == expected
    assert all(one.dtype == np.uint16 and 0 < len(one) <= 32 for one in ids) and len(ids[3]) == 32
    assert tokenizer.tokenize([]) == []
    first = tokenizer.bare("a")["input_ids"]
    assert tokenizer.prefix_tokens == {"t5": 0, "qwen2": 0}.get(family, 1) <= len(first)


@pytest.mark.parametrize("family", CHATS)
def test_a_chat_is_the_tokenizers_own_and_closes_after_a_long_caption(folder: Path, family: str) -> None:
    asked, plain = "Describe: ", [one for one in PLAIN if one]
    tokenizer = load(folder, family, template="chat", instruction=asked, max_length=120)
    today = datetime.now().strftime("%d %b %Y")  # a template that tells it gives a fixed one here
    bare = load(folder, family).bare
    bare.chat_template = bare.chat_template.replace("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024")
    own = [
        bare.apply_chat_template([{"role": "user", "content": asked + one}], add_generation_prompt=True)["input_ids"]
        for one in plain
    ]
    ids = tokenizer.tokenize(plain)
    assert [one.tolist() for one in ids if len(one) < 120] == [one for one in own if len(one) < 120]
    assert today not in tokenizer.bare.decode(ids[0])
    assert 0 < tokenizer.prefix_tokens < len(ids[1])
    assert ids[0][: tokenizer.prefix_tokens].tolist() == own[1][: tokenizer.prefix_tokens]
    closing = next(n for n in range(1, 99) if own[0][-n - 1] != own[1][-n - 1])
    assert len(ids[2]) == 120 and ids[2][-closing:].tolist() == own[0][-closing:] and own[2] != ids[2].tolist()
    keep = 120 - closing
    assert ids[2][:keep].tolist() == own[2][:keep]


def test_a_model_that_thinks_is_told_not_to(tmp_path: Path) -> None:
    """As Qwen3's template: it writes an empty block of thoughts where it is told so."""
    bare = qwen2()
    thoughts = "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    bare.chat_template += thoughts
    bare.save_pretrained(tmp_path)
    config = TokenizerConfig(name="t", model=str(tmp_path), template="chat", id_type="int32")
    (ids,) = load_tokenizer(config).tokenize(["a cat"])
    assert bare.decode(ids).endswith("assistant\n<think>\n\n</think>\n\n")


def test_what_is_cut_is_counted(folder: Path) -> None:
    tokenizer = load(folder, "t5", max_length=6)
    captions = ["red", "red round big left blue green small red"]
    whole = load(folder, "t5", max_length=99).tokenize(captions)
    assert tokenizer.tokens_cut(captions) == [max(len(one) - 6, 0) for one in whole] and len(whole[1]) > 6
    assert tokenizer.tokens_cut([]) == []


@pytest.mark.parametrize("template", ["raw", "chat"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_caption_cannot_spell_control_tokens(folder: Path, family: str, template: str) -> None:
    if template == "chat" and family not in CHATS:
        pytest.skip("has no chat template")
    tokenizer = load(folder, family, template=template, instruction="Describe: ", max_length=128)
    control = tokenizer._control
    plain = control[tokenizer.tokenize(["a red circle"])[0]]
    for typed in TYPED[family]:
        assert control[tokenizer.bare(typed, add_special_tokens=False)["input_ids"]].any(), "a harmless word"
        captions = [
            f"a {typed} red{typed}circle",
            typed,
            typed * 2 + " a",
            f"the big {typed}",
            f"<{typed}/s> a",
            typed * 200,
        ]
        for ids in tokenizer.tokenize(captions):
            found = control[ids]
            assert found.sum() == plain.sum() and found[0] == plain[0] and found[-1] == plain[-1]
    words = tokenizer.tokenize(["a red circle", f"a {TYPED[family][0]} red circle"])
    assert set(words[0].tolist()) <= set(words[1].tolist()), "the words beside it stay"


def test_nor_in_letters_that_only_look_like_them() -> None:
    """T5 makes wide letters plain ones after it has looked for control tokens, and its model knows `</s>` as a piece."""
    tokenizer = CaptionTokenizer(TokenizerConfig(name="t5", model="t5"), t5())
    typed = "a red＜/s＞ circle"
    assert tokenizer.bare(typed)["input_ids"].count(1) == 2
    (ids,) = tokenizer.tokenize([typed])
    assert ids.tolist().count(1) == 1 and ids[-1] == 1


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), limit=st.integers(12, 40))
def test_any_caption_gives_an_honest_prompt(folder: Path, data: st.DataObject, limit: int) -> None:
    family = data.draw(st.sampled_from(sorted(FAMILIES)))
    part = st.one_of(st.sampled_from([*WORDS, *TYPED[family], " ", "\n"]), st.text(max_size=5))
    captions = data.draw(st.lists(st.lists(part, max_size=30).map("".join), min_size=1, max_size=5))
    tokenizer = CACHE.setdefault(family, load(folder, family))
    tokenizer.limit = limit
    ids = tokenizer.tokenize(captions)
    usual = tokenizer._control[tokenizer.tokenize(["a"])[0]].sum()
    for one in ids:
        assert 0 < len(one) <= limit
        assert tokenizer._control[one].sum() == usual or one.tolist() == [tokenizer.pad]
    alone = [tokenizer.tokenize([caption])[0].tolist() for caption in captions]
    assert [one.tolist() for one in ids] == alone


CACHE: dict[str, CaptionTokenizer] = {}


def test_an_instruction_stands_before_the_caption(folder: Path) -> None:
    tokenizer = load(folder, "llama", instruction="Describe the big square: ", max_length=16)
    own = tokenizer.bare(["Describe the big square: a red circle"])["input_ids"][0]
    assert tokenizer.tokenize(["a red circle"])[0].tolist() == own
    assert tokenizer.prefix_tokens == len(tokenizer.bare("Describe the big square:")["input_ids"])
    with pytest.raises(ValueError, match=r"max_length 5 leaves no room for a caption, .* take \d+ tokens"):
        load(folder, "llama", instruction="Describe the big square: ", max_length=5)


def test_flexible_goes_to_the_tokenizers_own_limit(folder: Path) -> None:
    assert load(folder, "t5", max_length="flexible").limit == 512
    (ids,) = load(folder, "t5", max_length="flexible").tokenize(["red " * 400])
    assert len(ids) == 401
    with pytest.raises(ValueError, match="states no longest prompt, which max_length 'flexible' needs"):
        load(folder, "gemma", max_length="flexible")


def test_a_large_vocabulary_needs_wide_ids(tmp_path: Path) -> None:
    large = qwen2()
    large.add_tokens([f"<word{number}>" for number in range(66_000)])
    config = TokenizerConfig(name="q", model="large", id_type="int32")
    assert CaptionTokenizer(config, large).tokenize(["a <word65999>"])[0].max() > 65_535
    with pytest.raises(ValueError, match=r"ids of large go up to \d+: set id_type to 'int32'"):
        CaptionTokenizer(replace(config, id_type="uint16"), large)


def test_what_cannot_be_is_refused(folder: Path) -> None:
    for wrong, said in (
        ({"name": "t5_x"}, "letters and digits"),
        ({"max_length": 1}, "at least 2, or 'flexible'"),
        ({"max_length": "long"}, "at least 2, or 'flexible'"),
        ({"captions": ()}, "different ones of long, short, alt"),
        ({"captions": (("long", 1.0), ("long", 2.0))}, "different ones of long, short, alt"),
        ({"captions": (("tall", 1.0),)}, "different ones of long, short, alt"),
        ({"captions": (("long", 0.0),)}, "must be above 0"),
        ({"template": "jinja"}, "template is 'jinja': choose raw or chat"),
    ):
        with pytest.raises(ValueError, match=said):
            TokenizerConfig(**{"name": "t5", "model": "m", **wrong})
    with pytest.raises(ValueError, match="has no chat template: set template to 'raw'"):
        load(folder, "clip", template="chat")


def test_columns_of_kinds() -> None:
    config = TokenizerConfig(name="t5", model="m", captions=(("long", 3.0), ("alt", 1.0), ("short", 1.0)))
    assert config.columns == {"tokens_t5": "caption", "tokens_t5_alt": "text", "tokens_t5_short": "short_caption"}
    assert token_columns("t5", ["short"]) == ["tokens_t5"]


def test_facts_tell_all_that_decides_ids(folder: Path, tmp_path: Path) -> None:
    config = TokenizerConfig(name="q", model=str(folder / "qwen2"), captions=(("long", 1.0), ("alt", 0.5)))
    assert tokenizer_facts(config) == {
        "id": tokenizer_id(config.model, None),
        "max_length": 128,
        "template": "raw",
        "instruction": "",
        "captions": [["long", 1.0], ["alt", 0.5]],
    }
    assert "captions" not in prompt_facts(config)
    for change in ({"template": "chat"}, {"instruction": "Describe: "}, {"max_length": 64}):
        assert prompt_facts(replace(config, **change)) != prompt_facts(config)
    shutil.copytree(folder / "qwen2", tmp_path / "copy")
    assert tokenizer_id(str(tmp_path / "copy"), None) == tokenizer_id(config.model, None)
    (tmp_path / "copy" / "chat_template.jinja").write_text("another")
    assert tokenizer_id(str(tmp_path / "copy"), None) != tokenizer_id(config.model, None)
    assert tokenizer_id(str(tmp_path), None, "copy") == tokenizer_id(str(tmp_path / "copy"), None)
    assert tokenizer_id("org/name", "abc", "tokenizer") == "org/name/tokenizer@abc"
