"""What may pass is asked again, within bounds; what lasts is told at once."""

from __future__ import annotations

import errno
import io
import itertools
import socket

import pytest
from aiohttp import ClientPayloadError
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError
from s3fs.errors import translate_boto_error

from pipeline import patience
from pipeline.patience import PATIENCE, ask, may_pass


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Nobody waits: the pauses are added to the clock."""
    found: list[float] = []
    monkeypatch.setattr(patience, "sleep", found.append)
    monkeypatch.setattr(patience, "monotonic", lambda: sum(found))
    return found


def answered(code: str, status: int | None = None) -> Exception:
    """What s3fs makes of an answer of S3's."""
    told = {"ResponseMetadata": {"HTTPStatusCode": status}} if status else {}
    return translate_boto_error(ClientError({"Error": {"Code": code, "Message": "so it is"}, **told}, "GetObject"))


def raised_for(error: Exception, cause: Exception) -> Exception:
    """The error, as it is where the cause was caught."""
    try:
        try:
            raise cause
        except type(cause):
            raise error  # noqa: B904 - so that it is but the context
    except type(error) as found:
        return found


def unknown_host(number: int) -> Exception:
    """What botocore makes of a name that cannot be looked up."""
    reason = raised_for(OSError("cannot connect"), socket.gaierror(number, "no such name"))
    return raised_for(EndpointConnectionError(endpoint_url="http://nobody"), reason)


@pytest.mark.parametrize(
    "error",
    [
        *(
            answered(code)
            for code in ("SlowDown", "503", "ServiceUnavailable", "InternalError", "500", "RequestTimeout")
        ),
        *(TimeoutError(), ConnectionResetError(), BrokenPipeError(errno.EPIPE, ""), OSError("of some library")),
        EndpointConnectionError(endpoint_url="http://127.0.0.1:1"),
        ClientPayloadError("cut"),
        *(answered("Odd", 503), answered("RequestTimeout", 400), OSError(errno.EIO, "odd")),
        *(unknown_host(socket.EAI_AGAIN), type("Timeout", (OSError,), {})("read")),
        type("HttpError", (Exception,), {"code": 429})(),
    ],
    ids=repr,
)
def test_what_may_pass_is_asked_again(error: Exception, pauses: list[float]) -> None:
    failures = iter([error] * 3)

    def request() -> str:
        for failure in failures:
            raise failure
        return "an answer"

    assert may_pass(error) and ask(request, "s3://data") == "an answer"
    assert len(pauses) == 3 and all(first < second for first, second in itertools.pairwise(pauses[::2]))


@pytest.mark.parametrize(
    "error",
    [
        *(answered(code) for code in ("NoSuchKey", "404", "AccessDenied", "403", "InvalidAccessKeyId", "InvalidRange")),
        *(FileNotFoundError(), PermissionError(), OSError(errno.ENOSPC, "full"), ValueError("wrong"), TypeError("bug")),
        NoCredentialsError(),
        *(FileExistsError(), IsADirectoryError(), NotADirectoryError(), io.UnsupportedOperation("write")),
        *(answered("Odd", 409), answered("XAmzContentSHA256Mismatch", 400), unknown_host(socket.EAI_NONAME)),
        *(OSError("Forbidden: https://storage"), type("ArrowError", (OSError,), {})("of no number")),
        type("HttpError", (Exception,), {"code": 400})(),
    ],
    ids=repr,
)
def test_what_lasts_is_told_at_once(error: Exception, pauses: list[float]) -> None:
    def request() -> None:
        raise error

    assert not may_pass(error)
    with pytest.raises((OSError, ValueError)) as raised:
        ask(request, "s3://data")
    assert (getattr(error, "strerror", None) or str(error)) in str(raised.value) and not pauses
    if isinstance(error, OSError):
        assert type(raised.value) is type(error) and raised.value.errno == error.errno
    if type(error).__module__ == "builtins" and isinstance(error, OSError):
        assert "s3://data" in str(raised.value)


def test_patience_ends(pauses: list[float], caplog: pytest.LogCaptureFixture) -> None:
    """In one line that says what failed and for how long; until then long pauses are told of."""

    def request() -> None:
        raise OSError(errno.EBUSY, "Please reduce your request rate")

    with pytest.raises(OSError, match=r"s3://data has failed for \d+ s: OSError: .*reduce your request rate") as raised:
        ask(request, "s3://data")
    assert raised.value.errno == errno.EBUSY and PATIENCE - 16 <= sum(pauses) <= PATIENCE and max(pauses) <= 16
    assert 0 < len(caplog.records) < len(pauses) and "s3://data fails (OSError" in caplog.text
