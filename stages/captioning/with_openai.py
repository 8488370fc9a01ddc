"""Captions from servers that speak OpenAI's chat protocol: vLLM, SGLang, TGI, llama.cpp, `transformers serve`, a vendor.

Pictures travel as data URLs, base64 of their bytes, so no server fetches anything. A server that stumbles is asked again
or another is; when all of them fail, the build stops and says so, instead of failing row after row.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from yarl import URL

from .engine import Answer, EngineConfig, Finish, decode, not_an_image

_TRY_AGAIN = (408, 409, 425, 429)
_MISCONFIGURED = (401, 403, 404, 405)
_MOST_WAIT = 60.0
_LOADED = "refuses for load (HTTP 429)"
_CONNECT = 10.0  # seconds to open a connection: a machine that is gone must not cost a whole timeout


@dataclass(frozen=True, kw_only=True)
class OpenAIConfig(EngineConfig):
    """Which servers, and how patiently they are asked. `model` is the name they serve it as; `revision` a note of what they
    run (a commit, say): raise it when the servers change, and the captions are made anew.
    """

    endpoints: tuple[str, ...]
    """Addresses up to and with the version, such as http://gpu7:8000/v1. Each request goes to the least busy one."""
    api_key_env: str = ""
    """Name of the environment variable that holds the key, on every machine with such an actor. The key is never stored."""
    concurrency: int = 16
    """Requests in flight to each endpoint."""
    timeout: float = 120.0
    """Seconds for one answer."""
    retries: int = 4
    """Further tries of a picture after a timeout, a lost connection, a 429 or a 5xx, at another endpoint if there is one."""
    backoff: float = 1.0
    """Seconds before the first further try, doubled each time and up to half as many again, so that not all come back at once;
    a server's Retry-After counts up to a minute."""
    patience: int = 24
    """After so many pictures in a row that no endpoint answered for, all their tries included, the build stops; and where
    the first so many are all refused."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for endpoint in self.endpoints:
            url = URL(endpoint)
            if url.scheme not in ("http", "https") or not url.host or url.user or url.query_string:
                raise ValueError(f"recaption: an endpoint looks like http://host:8000/v1, got {endpoint!r}")
        if not self.endpoints:
            raise ValueError(
                "recaption: the openai engine needs at least one endpoint, http://host:8000/v1 for example"
            )
        if min(self.concurrency, self.patience) < 1 or self.timeout <= 0 or min(self.retries, self.backoff) < 0:
            raise ValueError(
                "recaption: concurrency and patience must be at least 1, timeout above 0, retries and backoff not negative"
            )

    def identity(self) -> dict[str, Any]:
        """The model as it is served and what is decoded; not who serves it, nor how it is asked."""
        return {
            "engine": "openai",
            "model": self.model,
            "revision": self.revision,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
        }

    def load(self) -> OpenAIEngine:
        """Makes ready to ask. Raises ValueError where the key's variable is not set."""
        return OpenAIEngine(self)


class ServersFail(RuntimeError):
    """No caption server answers: more rows would only fail as well."""


class _Stumbled(Exception):
    """A try without an answer, after which another may have one."""

    def __init__(self, reason: str, detail: str, wait: float = 0.0) -> None:
        super().__init__(detail)
        self.reason, self.wait = reason, wait


@dataclass(kw_only=True)
class _Endpoint:
    url: str
    slots: asyncio.Semaphore
    busy: int = 0
    """Requests in flight, or waiting for a slot."""
    failures: int = 0
    """In a row."""
    last: str = field(default="")
    """What the last failure was."""


class OpenAIEngine:
    """Asks for many captions at once."""

    def __init__(self, config: OpenAIConfig) -> None:
        self._config = config
        self._unanswered = 0  # pictures in a row
        self._refused, self._answered = 0, False  # pictures refused before there was any answer
        self._headers = {}
        if config.api_key_env:
            key = os.environ.get(config.api_key_env)
            if not key:
                raise ValueError(f"recaption: api_key_env names {config.api_key_env}, which is not set here")
            self._headers = {"Authorization": f"Bearer {key}"}

    def captions(self, images: Sequence[bytes], prompts: Sequence[str], seeds: Sequence[int]) -> list[Answer]:
        """One answer a picture. Raises ServersFail where no server answers any more, ValueError where none will take
        a request as it is made.
        """
        return asyncio.run(self._all(images, prompts, seeds))

    async def _all(self, images: Sequence[bytes], prompts: Sequence[str], seeds: Sequence[int]) -> list[Answer]:
        config = self._config
        endpoints = [
            _Endpoint(url=e.rstrip("/"), slots=asyncio.Semaphore(config.concurrency)) for e in config.endpoints
        ]
        timeout = aiohttp.ClientTimeout(total=config.timeout, sock_connect=_CONNECT)
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=timeout, headers=self._headers, trust_env=False
        ) as session:
            gate = asyncio.Semaphore(config.concurrency * len(endpoints))

            async def one(image: bytes, prompt: str, seed: int) -> Answer:
                async with gate:  # so that few pictures are held as base64
                    return await self._answer(session, endpoints, await self._body(image, prompt, seed))

            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(one(*asked)) for asked in zip(images, prompts, seeds, strict=True)]
            except ExceptionGroup as several:  # the first tells all
                raise several.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _body(self, image: bytes, prompt: str, seed: int) -> dict[str, Any] | None:
        """The request; None where the picture cannot be read, which a server would only answer with an error."""
        (opened,) = await asyncio.to_thread(decode, [image])
        if opened is None:
            return None
        kind = "png" if image.startswith(b"\x89PNG") else "webp" if image[8:12] == b"WEBP" else "jpeg"
        data = f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
        content = [{"type": "image_url", "image_url": {"url": data}}, {"type": "text", "text": prompt}]
        config = self._config
        body = {"model": config.model, "max_tokens": config.max_new_tokens, "temperature": config.temperature}
        return {
            **body,
            "messages": [{"role": "user", "content": content}],
            **({"seed": seed} if config.temperature else {}),
        }

    async def _answer(
        self, session: aiohttp.ClientSession, endpoints: list[_Endpoint], body: dict[str, Any] | None
    ) -> Answer:
        if body is None:
            return not_an_image()
        reason = ""
        for attempt in range(self._config.retries + 1):
            endpoint = min(endpoints, key=lambda e: (min(e.failures, 3), e.busy))  # one that fails is asked last
            try:
                answer = await self._ask(session, endpoint, body)
            except _Stumbled as stumble:
                endpoint.failures += 1
                endpoint.last, reason = str(stumble), stumble.reason
                if attempt < self._config.retries:
                    await asyncio.sleep(max(stumble.wait, self._config.backoff * 2**attempt) * random.uniform(1, 1.5))
            else:
                endpoint.failures = self._unanswered = 0
                return answer
        self._unanswered += 1
        if self._unanswered >= self._config.patience:
            told = "; ".join(f"{e.url}: {e.last or 'not asked'}" for e in endpoints)
            advice = "lower concurrency" if all(e.last in ("", _LOADED) for e in endpoints) else "start them"
            raise ServersFail(f"recaption: no caption server answers ({told}): {advice} and build again")
        return Answer(status="failed", reason=reason, transient=True)

    async def _ask(self, session: aiohttp.ClientSession, endpoint: _Endpoint, body: dict[str, Any]) -> Answer:
        """One try. Raises _Stumbled where another may help, ValueError where none will for any row."""
        endpoint.busy += 1
        try:
            async with endpoint.slots, session.post(f"{endpoint.url}/chat/completions", json=body) as response:
                if response.status in _MISCONFIGURED:
                    raise ValueError(
                        f"recaption: {endpoint.url} answers {response.status} ({await _said(response)}): "
                        "look at model, endpoints and api_key_env"
                    )
                if response.status in _TRY_AGAIN or response.status >= 500:
                    detail = _LOADED if response.status == 429 else f"HTTP {response.status}"
                    raise _Stumbled("caption_server_error", detail, _retry_after(response))
                if response.status != 200:
                    return await self._refuse(endpoint, response)
                answer = read_answer(await response.read())
                self._answered = True
                return answer
        except TimeoutError:
            raise _Stumbled("caption_timeout", f"no answer within {self._config.timeout:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise _Stumbled("caption_server_error", str(error) or type(error).__name__) from None
        finally:
            endpoint.busy -= 1

    async def _refuse(self, endpoint: _Endpoint, response: aiohttp.ClientResponse) -> Answer:
        """The answer to 400, 413 and 422: this picture's or prompt's matter, unless no other has ever been taken. Then it is
        a setting's, and raises ValueError.
        """
        self._refused += 1
        if not self._answered and self._refused >= self._config.patience:
            raise ValueError(
                f"recaption: {endpoint.url} refused all of the first {self._refused} pictures with {response.status} "
                f"({await _said(response)}): look at model, max_new_tokens and prompts"
            )
        return Answer(status="failed", reason="caption_request_refused")


async def _said(response: aiohttp.ClientResponse) -> str:
    """What a server says of an error: 200 characters on one line."""
    return " ".join((await response.content.read(800)).decode(errors="replace")[:200].split())


def read_answer(body: bytes) -> Answer:
    """The answer in what a server sent. Raises _Stumbled where that is not what the protocol says."""
    try:
        said = json.loads(body)
        choice = said["choices"][0]
        text, ended = choice["message"]["content"], choice.get("finish_reason")
        tokens = (said.get("usage") or {}).get("completion_tokens")
        if not isinstance(text, str | None) or not isinstance(tokens, int | None):
            raise TypeError
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise _Stumbled("caption_server_error", "an answer that is no chat completion") from None
    if ended == "content_filter":
        return Answer(status="dropped", reason="caption_refused")
    finish: Finish = "length" if ended == "length" else "stop"
    counted = tokens if tokens is not None and 0 <= tokens < 2**31 else None
    whole = (text or "").encode(errors="replace").decode()  # half of a surrogate pair cannot be stored
    return Answer(text=whole, finish=finish, tokens=counted)


def _retry_after(response: aiohttp.ClientResponse) -> float:
    """Seconds; 0 where the server says nothing or gives a date."""
    try:
        seconds = float(response.headers.get("Retry-After", "0"))
    except ValueError:
        return 0.0
    return min(max(0.0, seconds), _MOST_WAIT)  # in this order nan is 0
