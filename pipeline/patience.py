"""Trouble that passes: a store of objects that asks for fewer requests, a connection that breaks. What was asked is asked again.

The libraries try again by themselves, but briefly: s3fs five times within two seconds, each time botocore's five
(`AWS_MAX_ATTEMPTS` and `AWS_RETRY_MODE` set those), others not at all. A store's bad minute must not end a build of days.
"""

from __future__ import annotations

import errno
import io
import logging
import random
import socket
from collections.abc import Callable, Iterator, Mapping
from time import monotonic, sleep
from typing import TypeVar

PATIENCE = 120.0
"""Seconds from the first attempt on within which the last is begun. How long one may take is the library's matter."""
_FIRST, _LONGEST = 0.25, 16.0  # seconds of the pauses, before chance shortens them
_TOLD = 4.0  # a pause that could be as long as this is told of
_PASSING = {
    *(errno.EIO, errno.EREMOTEIO, errno.EBUSY, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT, errno.ESTALE),
    *(errno.EPIPE, errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.ENOTCONN),
    *(errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH, socket.EAI_AGAIN),
}
"""Errors of the system that another attempt may help. s3fs makes EBUSY of 503 and SlowDown, EREMOTEIO of 500."""
_KINDS = {
    *("ConnectionError", "HTTPClientError", "IncompleteReadError", "ResponseParserError"),  # botocore's
    *("ClientConnectionError", "ClientPayloadError"),  # aiohttp's
    *("ServiceRequestError", "ServiceResponseError"),  # Azure's
    *("Timeout", "ChunkedEncodingError"),  # requests'
}
"""Exceptions of libraries' own that stand for a broken connection, by name: which libraries are there is the user's matter."""
_LASTING = (
    *(FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError),
    io.UnsupportedOperation,
)
_ANSWERS = {408, 425, 429, 500, 502, 503, 504}  # HTTP
_T = TypeVar("_T")
_log = logging.getLogger("densebridge")
_dice = random.SystemRandom()  # forked workers would share another's state, and all ask at once


def ask(request: Callable[[], _T], where: str) -> _T:
    """What `request` returns, made again while it fails with what may pass; it must do no harm twice. Raises OSError that
    names `where` once patience ends, and at once what lasts: of the same class, a library's own kind of exception as OSError.
    """
    began, longest = monotonic(), _FIRST
    while True:
        try:
            return request()
        except Exception as error:
            if not may_pass(error):
                if type(error).__module__ == "builtins" and isinstance(error, OSError) and where not in str(error):
                    raise _named(error, where) from error
                if isinstance(error, (OSError, ValueError)):
                    raise
                raise OSError(errno.EIO, f"{where}: {type(error).__name__}: {error}") from error
            pause, waited = _dice.uniform(longest / 2, longest), monotonic() - began
            if waited + pause > PATIENCE:
                raise OSError(
                    getattr(error, "errno", None) or errno.EIO,
                    f"{where} has failed for {waited:.0f} s: {type(error).__name__}: {error}",
                ) from error
            if longest >= _TOLD:
                _log.warning(
                    "%s fails (%s: %s) and is asked again in %.0f s", where, type(error).__name__, error, pause
                )
        sleep(pause)
        longest = min(2 * longest, _LONGEST)


def _named(error: OSError, where: str) -> OSError:
    """The error, of its own class and number, in a line that says where."""
    text = f"{where}: {error.strerror or str(error) or type(error).__name__}"
    return type(error)(text) if error.errno is None else type(error)(error.errno, text)


def may_pass(error: BaseException) -> bool:
    """Whether another attempt may succeed: never where something is not there, or not allowed."""
    if isinstance(error, _LASTING) or str(error).startswith("Forbidden"):  # gcsfs says so with a plain OSError
        return False
    if any(isinstance(e, socket.gaierror) and e.errno != socket.EAI_AGAIN for e in _causes(error)):
        return False  # nobody has that name
    if isinstance(error, (TimeoutError, ConnectionError)) or any(k.__name__ in _KINDS for k in type(error).__mro__):
        return True  # before the answer is looked at: S3's RequestTimeout is a 400
    number = error.errno if isinstance(error, OSError) else None
    if number != errno.EIO and number in _PASSING:
        return True
    answer = _answer(error) or _answer(error.__cause__)
    if answer is not None:  # s3fs makes EIO of all that it does not know
        return answer in _ANSWERS
    return number == errno.EIO or (number is None and type(error) is OSError)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it was raised for."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _answer(error: BaseException | None) -> int | None:
    """The HTTP status that a library's exception tells of: botocore's in its response, others' as a number of their own."""
    response = getattr(error, "response", None)
    if isinstance(response, Mapping):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    told = [getattr(error, name, None) for name in ("status", "status_code", "code")]
    return next((status for status in told if isinstance(status, int)), None)
