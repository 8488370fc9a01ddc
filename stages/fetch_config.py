"""How the download stage asks strangers' servers: identity, deadlines, caps, pace, and whose word it heeds."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from .opt_out import HEEDED, KNOWN
from .robots import SITE_FILES, product_token

MANNERS = frozenset(
    {
        "user_agent",
        "timeout",
        "connect_timeout",
        "retries",
        "backoff",
        "max_wait",
        "concurrency",
        "per_host",
        "per_host_rate",
        "host_patience",
    }
)
"""Settings that only change who asks, how fast and how patiently; not what a picture that comes is."""

_CONTACT = re.compile(r"[^\s@(+]+@[^\s@)]+\.[^\s@)]+|https?://[^\s/)]+\.[^\s/)]+")


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """How to ask for a URL, and when to give up."""

    user_agent: str = "densebridge/0.1"
    """What we call ourselves; the first word (up to "/") is the name that robots.txt and opt-outs can address. It must name
    a page or an e-mail address where those asked can reach you: "mybot/1.0 (+https://my.site/bot)"."""
    timeout: float = 10.0
    """Seconds that one try may take in all: names, connections, redirects and body. Waiting for a turn does not count."""
    connect_timeout: float = 5.0
    """Seconds to open a connection, TLS included."""
    max_bytes: int = 32 << 20
    """A body longer than this is not read to its end."""
    max_redirects: int = 5
    """Redirects followed; each one's address is checked like the first."""
    retries: int = 2
    """Further tries after a transient failure: connection, timeout, cut body, 429, 5xx, a name server that is busy."""
    backoff: float = 0.5
    """Seconds before the first retry; doubled each time, times 0.5 to 1.5 as the URL's digest says."""
    max_wait: float = 60.0
    """Seconds that a URL may wait for its turn at a host, for its rate, a robots.txt's Crawl-delay or a Retry-After. What
    would wait longer fails for now (host_busy)."""
    concurrency: int = 64
    """Requests in flight."""
    per_host: int = 8
    """Requests in flight to one host."""
    per_host_rate: float = 20.0
    """Requests a second to one host, of each worker."""
    host_patience: int = 32
    """After so many failures to get any answer from a host, one after the other, its remaining URLs are not tried."""
    allow_private_hosts: bool = False
    """Whether private, loopback and link-local addresses may be asked. For tests and intranets only."""
    site_files: tuple[Literal["robots.txt", "ai.txt", "tdmrep.json"], ...] = ("robots.txt",)
    """Files of a site that are asked for once a day, before its first picture. A robots.txt that the server fails to answer
    (5xx, no answer) holds the site's pictures back for now (robots_unreachable); one that is not there (4xx) allows all."""
    opt_out: tuple[str, ...] = HEEDED
    """Directives that drop a URL, of `stages.opt_out.KNOWN`; all are recorded, whether they are listed here or not."""

    def __post_init__(self) -> None:
        for name in ("max_redirects", "retries", "backoff"):
            if getattr(self, name) < 0:
                raise ValueError(f"fetch: {name} must not be negative, got {getattr(self, name)}")
        positive = ["timeout", "connect_timeout", "max_bytes", "max_wait"]
        for name in (*positive, "concurrency", "per_host", "per_host_rate", "host_patience"):
            if not getattr(self, name) > 0:
                raise ValueError(f"fetch: {name} must be above 0, got {getattr(self, name)}")
        agent = self.user_agent
        if not product_token(agent) or not agent.isprintable() or not agent.isascii():
            raise ValueError(
                f"fetch: user_agent must be one line of plain ASCII that begins with a name, got {agent!r}"
            )
        if isinstance(self.opt_out, str) or not {*self.opt_out} <= {*KNOWN}:
            raise ValueError(f"fetch: opt_out must be a tuple of {', '.join(KNOWN)}; got {self.opt_out!r}")
        if isinstance(self.site_files, str) or not {*self.site_files} <= {*SITE_FILES}:
            raise ValueError(f"fetch: site_files must be a tuple of {', '.join(SITE_FILES)}; got {self.site_files!r}")

    def check_contact(self) -> None:
        """Raises ValueError if the public is to be asked by someone who does not say how to be reached."""
        if not self.allow_private_hosts and not _CONTACT.search(self.user_agent):
            raise ValueError(
                f"fetch: user_agent {self.user_agent!r} names no contact: add a page or an e-mail address of yours, as in "
                "'mybot/1.0 (+https://my.site/bot)'"
            )
