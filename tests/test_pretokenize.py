"""Kinds of captions to columns of ids: each the tokenizer's own, null where a sample has none, small in the table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.captions import TokenizerConfig
from pipeline.stage import check_stages
from stages.pack import Pack, PackConfig
from stages.pretokenize import Pretokenize, PretokenizeConfig
from tests.small_stages import Small, SmallConfig
from tests.tokenizer_families import save_families

BATCH = pa.table(
    {
        "key": ["a", "b", "c", "d"],
        "caption": ["a red circle", "the big square", None, "a 🦊 " * 300],
        "short_caption": pa.array([None, "square", None, None], pa.string()),
        "text": ["", "big", "  \n", "left of </s> the"],
    }
)
KINDS = (("long", 1.0), ("short", 2.0), ("alt", 0.5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers")
    save_families(folder)
    return folder


def stage(folder: Path, family: str = "t5", **changes: Any) -> Pretokenize:
    config = TokenizerConfig(**{"name": family, "model": str(folder / family), "max_length": 16, **changes})
    made = Pretokenize(PretokenizeConfig(tokenizer=config))
    made.load()
    return made


def table(made: Pretokenize, batch: pa.Table) -> pa.Table:
    found = made.process(batch)
    return pa.table({name: pa.array(found[name], made.writes.field(name).type) for name in made.writes.names})


def test_each_kind_has_its_column(folder: Path) -> None:
    made = stage(folder, captions=KINDS)
    assert made.reads == ("caption", "short_caption", "text")
    assert made.writes.names == ["tokens_t5", "tokens_t5_short", "tokens_t5_alt"]
    assert set(made.writes.types) == {pa.list_(pa.uint16())}
    found = table(made, BATCH)
    own = made._tokenizer.bare
    assert found.column("tokens_t5").to_pylist()[:3] == [*own(["a red circle", "the big square"])["input_ids"], None]
    assert len(found.column("tokens_t5")[3]) == 16 and found.column("tokens_t5")[3].as_py()[-1] == own.eos_token_id
    assert found.column("tokens_t5_short").to_pylist() == [None, own("square")["input_ids"], None, None]
    alt = found.column("tokens_t5_alt").to_pylist()
    assert alt[:3] == [None, own("big")["input_ids"], None] and alt[3].count(own.eos_token_id) == 1
    ends = made.process(BATCH)
    assert ends["status"] == ["kept", "kept", "failed", "kept"] and ends["reason"] == [None, None, "no_caption", None]


def test_only_what_is_asked_for_is_read_and_written(folder: Path) -> None:
    made = stage(folder)
    assert made.reads == ("caption",) and made.writes.names == ["tokens_t5"]
    assert stage(folder, captions=(("alt", 1.0),)).reads == ("text",)
    nothing = table(made, BATCH.select(["key", "caption"]).slice(0, 0))
    assert nothing.num_rows == 0


def test_several_language_models_stand_side_by_side(folder: Path) -> None:
    wide = stage(folder, "qwen2", id_type="int32", template="chat", max_length=64)
    assert wide.writes.types == [pa.list_(pa.int32())]
    stages = [stage(folder), wide]
    with pytest.raises(ValueError, match="reads 'caption', which no stage before it writes"):
        check_stages(stages)
    assert [s.name for s in stages] == ["pretokenize_t5", "pretokenize_qwen2"]
    assert len({s.config_id for s in stages}) == 2


def test_ids_are_made_again_only_for_what_changes_them(folder: Path) -> None:
    before = stage(folder, captions=KINDS).config_id
    assert stage(folder, captions=(("long", 9.0), *KINDS[1:])).config_id == before
    for change in ({"max_length": 32}, {"instruction": "the "}, {"captions": KINDS[:2]}, {"id_type": "int32"}):
        assert stage(folder, **{"captions": KINDS, **change}).config_id != before


def test_any_batch_gives_the_same(folder: Path) -> None:
    made = stage(folder, captions=KINDS)
    whole = table(made, BATCH)
    parts = pa.concat_tables([table(made, BATCH.slice(row, 1)) for row in range(BATCH.num_rows)])
    assert whole.equals(parts)
    assert isinstance(made.process(BATCH)["tokens_t5"][0], np.ndarray)


def test_a_view_may_not_tell_of_another_tokenizer(folder: Path) -> None:
    """Else the trainer would take one tokenizer's ids for another's."""

    class Captions(Small):
        name = "captions"
        reads = ("url",)
        writes = pa.schema([(name, pa.string()) for name in ("caption", "text")])

    made = stage(folder)
    packed = Pack(PackConfig(view="v", resolution=8, tokenizers=(replace(made.config.tokenizer, max_length=8),)))
    packed.reads = ("tokens_t5",)
    with pytest.raises(
        ValueError, match=r"'pack_v' is set for .*max_length 8, raw.* 'tokens_t5', .* was made by .*max_length 16"
    ):
        check_stages([Captions(SmallConfig()), made, packed])
