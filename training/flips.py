"""Pictures mirrored left to right: half of the positions, and never one whose captions tell left from right.

Mirrored, "a dog left of a tree" is wrong, and connectors for dense captions are trained to heed just that. So a view whose
captions speak of sides is refused at the start, by a look at some of its samples; and as some are not all, each sample's own
captions are asked again when it is read. Writing in a picture is mirrored as well: captions rarely tell.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from pipeline.captions import CAPTION_COLUMNS
from pipeline.shards import View, ViewInfo

LOOKED_AT = 1000
"""Samples whose captions are looked at before a run: of a kind that one in 300 is, they miss all with 4 % probability."""
_TOGETHER = 16  # samples that are read at a time: elsewhere each is a request
# English and Chinese, also where they mean something else ("what is left"): a picture less is mirrored, nothing is learnt wrong.
_SIDES = re.compile(r"\b(left|right)(s|y|most|ward|wards|hand|handed|side)?\b|clockwise|左|右", re.IGNORECASE)


def speaks_of_sides(text: str) -> bool:
    """Whether a caption would be wrong of the mirrored picture, as far as its words tell."""
    return _SIDES.search(text) is not None


def captions_of(info: ViewInfo, tokenizer: str, facts: Mapping[str, Any]) -> list[str]:
    """The captions that a sample may be shown with, as its json member `facts` has them; none where it does not tell."""
    kinds = [kind for kind, _ in info.tokenizers[tokenizer]["captions"]]
    return [text for kind in kinds if (text := facts.get(CAPTION_COLUMNS[kind]))]


def may_flip(info: ViewInfo, tokenizer: str, facts: Mapping[str, Any]) -> bool:
    """Whether a sample's captions are known, and as true of the mirrored picture."""
    captions = captions_of(info, tokenizer, facts)
    return bool(captions) and not any(map(speaks_of_sides, captions))


def check_flips(view: View, tokenizer: str) -> None:
    """Raises ValueError where captions of the view speak of left and right, or where it does not tell its captions."""
    rows = np.unique(np.linspace(0, len(view) - 1, min(LOOKED_AT, len(view))).astype(int)).tolist()
    with ThreadPoolExecutor(_TOGETHER) as pool:
        told = [captions_of(view.info, tokenizer, facts) for facts in pool.map(lambda row: _facts(view, row), rows)]
    name, keys = view.info.view, view.manifest.column("key")
    if not any(told):
        raise ValueError(
            f"view {name!r} does not tell its captions, so that nobody knows whether they speak of left and right: set "
            "training.flip to False, or pack it after the stage that makes them"
        )
    found = [row for row, captions in zip(rows, told, strict=True) if any(map(speaks_of_sides, captions))]
    if found:
        raise ValueError(
            f"training.flip mirrors pictures, but of {len(rows)} samples of view {name!r} {len(found)} have captions that speak "
            f"of left or right, {keys[found[0]].as_py()!r} for one: set flip to False, or train on a view without them"
        )


def _facts(view: View, row: int) -> dict[str, Any]:
    try:
        return view.facts(row)
    except (LookupError, OSError, json.JSONDecodeError):
        return {}  # what cannot be read is told of when it is its turn
