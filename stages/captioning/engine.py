"""What a captioner is to the recaption stage: pictures and prompts in, answers out, one each and in their order.

A picture that cannot be read, or a server that does not answer, is an answer too: one with a status and a reason.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from PIL import Image

from pipeline.sample import Status

from ..pictures import FORMATS

Prepared = TypeVar("Prepared")
Finish = Literal["stop", "length"]
"""Why an answer ended: the model said so, or it reached the most tokens it may have."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a captioner said of one picture, or why it said nothing."""

    text: str = ""
    """As the model wrote it, without special tokens."""
    finish: Finish | None = None
    """None where there is no answer."""
    tokens: int | None = None
    """Tokens that the model wrote, the one that ends the answer among them."""
    status: Status = "kept"
    reason: str | None = None
    """Why there is no answer, where `status` is not kept."""
    transient: bool = False
    """Whether another try may help."""


class Engine(Protocol):
    """A loaded captioner."""

    def captions(self, images: Sequence[bytes], prompts: Sequence[str], seeds: Sequence[int]) -> list[Answer]:
        """One answer for each picture (an encoded file) and prompt. A picture may come several times in a row, with
        another prompt each; it is then decoded once. `seeds` (32 bits) matter only where the engine samples.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What every engine is told."""

    model: str
    """Folder or hub name of an image-text-to-text model with a chat template; on a server, the name it is served as."""
    revision: str | None = None
    """Commit of the hub repository; pin it."""
    max_new_tokens: int = 256
    """Longest answer in tokens. One that is cut there is shortened to its last whole sentence."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; above, tokens are drawn, with a seed from the sample's key."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"recaption: max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"recaption: temperature must lie between 0 and 2, got {self.temperature}")

    def identity(self) -> dict[str, Any]:
        """What the captions depend on: the fields that matter, and the model's weights in place of its name."""
        raise NotImplementedError(f"{type(self).__name__} must define identity()")

    def load(self) -> Engine:
        """Loads the model, or makes ready to ask for it. Raises ValueError where a library or a setting is missing."""
        raise NotImplementedError(f"{type(self).__name__} must define load()")


def decode(images: Sequence[bytes]) -> list[Image.Image | None]:
    """The pictures as RGB, None for what is none. The same bytes object, several times in the list, is decoded once."""
    opened: dict[int, Image.Image | None] = {}
    for data in images:
        if id(data) not in opened:
            opened[id(data)] = _open(data)
    return [opened[id(data)] for data in images]


def _open(data: bytes) -> Image.Image | None:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS).convert("RGB")
    except Exception:  # PIL's readers raise anything at all for broken files
        return None


def not_an_image() -> Answer:
    """The answer for a picture that cannot be read."""
    return Answer(status="failed", reason="not_an_image")


def ahead(prepare: Callable[[slice], Prepared], count: int, size: int) -> Iterator[tuple[slice, Prepared]]:
    """Windows of `size` rows out of `count`, each prepared; the next one is prepared in a thread while the caller works on
    the present one, so that a model never waits for pictures to be decoded.
    """
    windows = [slice(start, min(start + size, count)) for start in range(0, count, size)]
    with ThreadPoolExecutor(1) as worker:
        coming = [worker.submit(prepare, window) for window in windows[:1]]
        for n, window in enumerate(windows):
            prepared = coming.pop().result()
            coming += [worker.submit(prepare, following) for following in windows[n + 1 : n + 2]]
            yield window, prepared
