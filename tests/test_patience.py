"""What may pass is asked again, within bounds; what lasts is told at once."""

from __future__ import annotations

import errno
import itertools

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


def answered(code: str) -> Exception:
    """What s3fs makes of an answer of S3's."""
    return translate_boto_error(ClientError({"Error": {"Code": code, "Message": "so it is"}}, "GetObject"))


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
    assert raised.value in (error, raised.value) and str(error) in str(raised.value) and not pauses


def test_patience_ends(pauses: list[float], caplog: pytest.LogCaptureFixture) -> None:
    """In one line that says what failed and for how long; until then long pauses are told of."""

    def request() -> None:
        raise OSError(errno.EBUSY, "Please reduce your request rate")

    with pytest.raises(OSError, match=r"s3://data has failed for \d+ s: OSError: .*reduce your request rate") as raised:
        ask(request, "s3://data")
    assert raised.value.errno == errno.EBUSY and PATIENCE - 16 <= sum(pauses) <= PATIENCE and max(pauses) <= 16
    assert 0 < len(caplog.records) < len(pauses) and "s3://data fails (OSError" in caplog.text
