"""clip-retrieval's `back` over a recipe's index, on this machine only, with the recipe's own CLIP for its queries.

Its safe settings: it listens on the loopback address and answers for that name alone; no page of another site may read it; it
fetches no picture by URL and opens no local file; no classifier is downloaded; what was taken down is not served.
"""

from __future__ import annotations

import base64
import binascii
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jobs.recipe import Recipe

from .built import Built, holds_taken_down, tombstone_files
from .environment import Inside
from .query import QueryEncoder

LOOK = 5.0  # seconds between looks for takedowns


def serve(recipe: Recipe, folder: Path, built: Built, port: int, ready: Callable[[int], None]) -> None:
    """Serves until it is interrupted; `ready` is told the port (0 takes any free one). Raises OSError where the port is taken or
    the server ends, ValueError where the index holds what was taken down, then or while it is served.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))
    heeded = check_takedowns(recipe, folder, built, list(built.tombstones))
    encoder = QueryEncoder(recipe)
    encoder.load()
    with Inside("back", str(folder / built.version), recipe.name, str(port)) as inside:
        looked = time.monotonic()
        while True:
            question = inside.hear(timeout=LOOK)
            if question and "port" in question:
                ready(question["port"])
            elif question:
                inside.say(**answer(encoder, question))
            if time.monotonic() - looked >= LOOK:
                heeded, looked = check_takedowns(recipe, folder, built, heeded), time.monotonic()


def check_takedowns(recipe: Recipe, folder: Path, built: Built, heeded: list[str]) -> list[str]:
    """The files of tombstones there are now. Raises ValueError where one that is not `heeded` names anything in the index."""
    there = tombstone_files(recipe.folder)
    if there != heeded and (held := holds_taken_down(recipe.folder, folder / built.version / "metadata")):
        raise ValueError(
            f"the index in {folder} holds {held} samples that were taken down, so it is not served: "
            "run `densebridge index`, then this again"
        )
    return there


def answer(encoder: QueryEncoder, question: Mapping[str, Any]) -> dict[str, Any]:
    """The vector of a query, or in `wrong` what is wrong with it."""
    try:
        if "text" in question:
            return {"vector": encoder.text(question["text"]).tolist()}
        return {"vector": encoder.picture(base64.b64decode(question["image"], validate=True)).tolist()}
    except binascii.Error:
        return {"wrong": "the image is not in base64"}
    except ValueError as error:
        return {"wrong": str(error)}
