"""Pictures that show the same, by their embeddings: which goes, how near it was said to be, and on what it must not depend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.sample import sample_key
from stages.deduplicate_semantic import DeduplicateSemantic, DeduplicateSemanticConfig, _Signs
from stages.near import Banding

WIDTH = 96


def cone(rng: np.random.Generator, count: int) -> np.ndarray:
    """Unit vectors whose cosines are 0.5 on average, as CLIP's are far above 0."""
    spread = rng.normal(size=(count, WIDTH)) / np.sqrt(WIDTH)
    return unit(spread + np.eye(WIDTH)[0])


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def at(rng: np.random.Generator, vectors: np.ndarray, cosine: float) -> np.ndarray:
    """Unit vectors at that cosine to these."""
    aside = rng.normal(size=vectors.shape)
    aside = unit(aside - (aside * vectors).sum(axis=1, keepdims=True) * vectors)
    return unit(cosine * vectors + np.sqrt(1 - cosine**2) * aside)


def stage(**settings: Any) -> DeduplicateSemantic:
    made = DeduplicateSemantic(DeduplicateSemanticConfig(**settings))
    made.load()
    return made


def run(made: DeduplicateSemantic, vectors: Any, start: int = 0, listed: bool = True) -> list[tuple]:
    """(reason, number of the original, cosine) of each row; keys are numbers from `start`."""
    known = {sample_key(str(n)): n for n in range(start + len(vectors))}
    rows = (
        pa.array(list(vectors.astype(np.float16)), pa.list_(pa.float16()))
        if not isinstance(vectors, pa.Array)
        else vectors
    )
    keys = [sample_key(str(start + n)) for n in range(len(rows))]
    columns = made.process(pa.table({"key": keys, "listed": [listed] * len(rows), "image_embedding": rows}))
    assert set(columns) == {*made.writes.names, "status", "reason"}
    return [
        (reason, known.get(key), cosine)
        for reason, key, cosine in zip(columns["reason"], columns["duplicate_of"], columns["cosine"], strict=True)
    ]


def test_what_shows_the_same_goes_however_the_rows_are_cut() -> None:
    rng = np.random.default_rng(0)
    first = cone(rng, 300)
    rows = np.concatenate([first, at(rng, first, 0.985), at(rng, first, 0.92), cone(rng, 300)]).astype(np.float16)
    made = stage(min_cosine=0.96)
    found = [end for start in range(0, 1200, 300) for end in run(made, rows[start : start + 300], start)]
    assert all(end == (None, None, None) for end in [*found[:300], *found[600:]])
    assert [original for _, original, _ in found[300:600]] == list(range(300))
    assert {reason for reason, _, _ in found[300:600]} == {"semantic_duplicate"}
    assert np.abs([cosine - 0.985 for _, _, cosine in found[300:600]]).max() < 0.02
    anew = stage(min_cosine=0.96)
    assert [
        end for part in ((0, 300), (300, 301), (301, 1200)) for end in run(anew, rows[slice(*part)], part[0])
    ] == found


def test_what_is_not_listed_is_no_original_of_what_is() -> None:
    rng = np.random.default_rng(1)
    vectors = cone(rng, 100)
    made = stage()
    for start, listed, original in (
        (0, False, None),
        (100, False, 0),
        (200, True, None),
        (300, True, 200),
        (400, False, 200),
    ):
        found = [o for _, o, _ in run(made, vectors, start, listed)]
        assert found == [None if original is None else original + n for n in range(100)]


def test_signs_are_the_same_in_batches_of_any_size_and_for_any_length() -> None:
    """And the bands' are balanced, though the embeddings lie in a cone."""
    rng = np.random.default_rng(2)
    vectors = cone(rng, 500)
    vectors[:, 5] += 0.7  # one number far beyond the others, as CLIP has them
    signs = _Signs(vectors, Banding(bands=16, bits=25))
    whole = signs.of(vectors)
    assert all(np.array_equal(signs.of(vectors[n : n + 1])[0], whole[n]) for n in range(0, 500, 25))
    assert np.array_equal(signs.of(vectors * np.float32(8)), whole) and whole.shape == (500, 16 + 7)
    share = np.unpackbits(whole.view(np.uint8), axis=1, bitorder="little").mean(axis=0)
    assert np.abs(share[1024:1424] - 0.5).max() < 0.2 < np.abs(share[:400] - 0.5).max()
    assert share[1424:].max() == 0


@pytest.mark.parametrize("cosine", (0.8, 0.9, 0.96, 0.99))
def test_the_cosine_is_told_as_closely_as_promised(cosine: float) -> None:
    rng = np.random.default_rng(3)
    vectors = cone(rng, 400)
    signs = _Signs(vectors, Banding())
    ones, others = signs.of(vectors)[:, :16], signs.of(at(rng, vectors, cosine))[:, :16]
    told = np.cos(np.pi * np.bitwise_count(ones ^ others).sum(axis=1) / 1024)
    angle = np.arccos(cosine)
    deviation = np.sin(angle) * np.pi * np.sqrt(angle / np.pi * (1 - angle / np.pi) / 1024)
    # All pairs share the random vectors and the cone's direction, so their mean is off a little, too.
    assert abs(told.mean() - cosine) < 0.4 * deviation and 0.7 < told.std() / deviation < 1.3


def test_values_that_are_no_embedding_have_a_reason() -> None:
    good = [1.0, 0.5, -0.25]
    rows = pa.array(
        [[1.0], good, None, [], [float("nan"), 1.0, 1.0], [0.0, 0.0, 0.0], [None, 1.0, 1.0], good],
        pa.list_(pa.float32()),
    )
    reasons = [reason for reason, _, _ in run(stage(), rows)]
    assert reasons == ["bad_embedding", None, *["bad_embedding"] * 5, "semantic_duplicate"]
    made = stage()
    assert [r for r, _, _ in run(made, pa.array([None, []], pa.list_(pa.float32())))] == ["bad_embedding"] * 2
    assert [r for r, _, _ in run(made, rows.slice(7), 2)] == [None]


def test_pictures_like_an_evaluation_set_are_taken_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    vectors = cone(rng, 50)
    np.save(tmp_path / "set.npy", at(rng, vectors[:20], 0.99).astype(np.float16))
    path = str(tmp_path / "set.npy")
    found = run(stage(evaluation=path), vectors)
    assert [reason for reason, _, _ in found] == ["near_evaluation"] * 20 + [None] * 30
    columns = stage(evaluation=path).process(
        pa.table({"key": [sample_key("a")], "listed": [True], "image_embedding": [vectors[3].tolist()]})
    )
    assert columns["evaluation_item"] == ["3"] and columns["duplicate_of"] == [None]
    np.save(tmp_path / "set.npy", vectors[:, :3])
    with pytest.raises(ValueError, match="has vectors of 3 numbers, the pictures' have 96"):
        run(stage(evaluation=path), vectors)


def test_settings(tmp_path: Path) -> None:
    np.save(tmp_path / "set.npy", np.eye(3))
    kinds: tuple[dict[str, Any], ...] = ({}, {"min_cosine": 0.9}, {"evaluation": str(tmp_path / "set.npy")})
    assert len({DeduplicateSemantic(DeduplicateSemanticConfig(**kind)).config_id for kind in kinds}) == 3
    assert DeduplicateSemanticConfig(min_cosine=0.96).near == 93
    for wrong in ({"min_cosine": 1.0}, {"min_cosine": 0.5}, {"banding": Banding(bands=50, bits=25)}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            DeduplicateSemanticConfig(**wrong)  # type: ignore[arg-type]
