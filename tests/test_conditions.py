"""A view's condition: whom it chooses, which columns it asks for, and what it may not be."""

from __future__ import annotations

import pyarrow as pa
import pytest

from stages.conditions import columns_of, select_rows

BATCH = pa.table(
    {
        "key": ["a", "b", "c"],
        "image": [b"1", b"2", b"3"],
        "width": pa.array([600, 512, 300], pa.int32()),
        "height": pa.array([512, 700, 900], pa.int32()),
        "caption": ["it's one", None, "three"],
        "clip_score": pa.array([0.3, 0.2, None], pa.float32()),
        "sentence_scores": pa.array([[0.3], [0.1, 0.4], None], pa.list_(pa.float32())),
        "tokens_t5": [[1], [2], [3]],
    }
)


@pytest.mark.parametrize(
    ("where", "keys"),
    [
        ("true", "abc"),
        ("false", ""),
        ("least(width, height) >= 512 AND clip_score >= 0.25", "a"),
        ("clip_score >= 0.1", "ab"),  # NULL is not true
        ("caption IS NULL OR caption LIKE '%''s%'", "ab"),
        ("list_min(sentence_scores) >= 0.2", "a"),
        ("len(list_filter(sentence_scores, lambda s: s > 0.2 AND width < 600)) > 0", "b"),
    ],
)
def test_a_condition_chooses_rows(where: str, keys: str) -> None:
    assert select_rows(BATCH, where, "v") == set(keys)


@pytest.mark.parametrize(
    ("where", "columns"),
    [
        ("true", ""),
        ("aesthetic_score > 6 AND least(original_width, original_height) >= 512",
         "aesthetic_score original_height original_width"),
        ("samples.width > 3", "width"),
        ("facts.a.b > 3", "facts"),
        ("CASE WHEN a THEN b ELSE c END = 'd'", "a b c"),
        ("list_reduce(s, lambda x, y: x + y) > x", "s x"),
        ("list_max(list_transform(p, lambda x: len(list_filter(q, lambda y: y > x AND z)))) > 1", "p q z"),
        ("len([x for x in words if x > least_score]) > 1", "least_score words"),
        ('"Clip Score" BETWEEN 1 AND 2 -- clip_score', "Clip Score"),
    ],
)  # fmt: skip
def test_the_columns_that_a_condition_asks_for(where: str, columns: str) -> None:
    assert " ".join(columns_of(where, "v")) == columns


@pytest.mark.parametrize("where", ["width > 'many'", "widht > 3", "", "caption > 3 +"])
def test_a_condition_that_does_not_fit_the_columns_is_told_in_one_line(where: str) -> None:
    with pytest.raises(ValueError, match=r"view 'v': its condition .* is not valid: \w+") as raised:
        select_rows(BATCH, where, "v")
    assert "\n" not in str(raised.value) and "LINE 1" not in str(raised.value)


def test_a_condition_is_told_from_one_row_alone() -> None:
    """Else a view would depend on the batches that its rows came in, or on the day."""
    for where, said in (
        ("clip_score > (SELECT avg(clip_score) FROM samples)", "asks other rows"),
        ("key IN (SELECT content FROM read_text('/etc/hosts'))", "asks other rows"),
        ("random() < 0.5", "random says another thing each time"),
        ("age(taken) > interval 1 year", "age says another thing each time"),
        ("day < current_date", "current_date says another thing each time"),
        ("COLUMNS('.*_score') > 3", "name those that it means"),
        ("1=1) --", "is not valid: syntax error"),
        ("true) UNION (SELECT key FROM samples", "is not valid: syntax error"),
        ("true; DROP TABLE samples", "is not valid"),
        ("width >", "is not valid: syntax error"),
    ):
        with pytest.raises(ValueError, match=said):
            columns_of(where, "v")


def test_words_are_no_questions() -> None:
    assert columns_of("caption <> 'SUBQUERY' AND text = 'STAR'", "v") == ("caption", "text")


def test_what_is_no_number_passes_no_threshold() -> None:
    scores = pa.table(
        {"key": ["a", "b", "c", "d"], "score": pa.array([0.4, float("nan"), float("inf"), None], pa.float32())}
    )
    assert select_rows(scores, "score > 0.3", "v") == {"a"}
