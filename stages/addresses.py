"""Which URLs and network addresses strangers may lead us to: the internet's, and nothing of ours.

A name is checked after it was looked up, and the very address that was checked is connected to, so that a name server
that answers differently the second time (DNS rebinding) gains nothing.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from concurrent.futures import ThreadPoolExecutor

from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

MOST_LETTERS = 8192
"""Of a URL; nobody's server takes a longer one."""

# Azure's metadata service answers on a public address, and older clouds' within 192.0.0.0/24 (IETF protocol assignments,
# of which Python's releases think differently); all others' are link-local, private or shared.
_NEVER_ASKED = tuple(
    map(ipaddress.ip_network, ("168.63.129.16/32", "192.0.0.0/24", "192.88.99.0/24", "3fff::/20", "5f00::/16"))
)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class Refused(Exception):
    """A URL that is not asked: bad_url, bad_scheme, bad_port or blocked_address. Not an OSError, which aiohttp would wrap."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class CheckedResolver(AbstractResolver):
    """Looks names up and hands out checked addresses alone; aiohttp connects to exactly what it is given here."""

    def __init__(self, *, allow_private_hosts: bool, threads: int) -> None:
        self._any_address = allow_private_hosts
        # The event loop's own pool has cores + 4 threads, which a few dead name servers block for minutes.
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="resolve")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Public addresses of `host`. Raises OSError as getaddrinfo does, Refused when none is public."""
        loop = asyncio.get_running_loop()
        look_up = socket.getaddrinfo
        found = await loop.run_in_executor(self._pool, lambda: look_up(host, port, family, socket.SOCK_STREAM))
        addresses = dict.fromkeys((kind, str(address[0])) for kind, _, _, _, address in found)
        allowed = [
            ResolveResult(hostname=host, host=ip, port=port, family=kind, proto=0, flags=socket.AI_NUMERICHOST)
            for kind, ip in addresses
            if self._any_address or is_public(ipaddress.ip_address(ip))
        ]
        if not allowed:
            raise Refused("blocked_address")
        return allowed

    async def close(self) -> None:
        """Lets go of the threads without waiting for look-ups that hang."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def checked_url(text: str, *, base: URL | None = None, allow_private_hosts: bool = False) -> URL:
    """The URL to ask for `text`, found at `base`. Raises Refused if it must not be asked.

    Names are checked when they are looked up, literal addresses here. Who is named before an @ is left out: the strangers'
    passwords are not ours to send.
    """
    try:
        url = URL(text.strip()) if base is None else base.join(URL(text.strip()))
        host = url.raw_host or ""  # as it will be connected to: lower case, IDNA, no brackets
        port = url.port or 0
    except (ValueError, TypeError, AttributeError):
        raise Refused("bad_url") from None
    if url.scheme not in ("http", "https"):
        raise Refused("bad_scheme" if url.scheme else "bad_url")
    if not host or len(str(url)) > MOST_LETTERS:
        raise Refused("bad_url")
    if not allow_private_hosts:
        address = literal_address(host.rstrip("."))
        if address is not None and not is_public(address):
            raise Refused("blocked_address")
        if port < 1024 and port not in (80, 443):  # a mail server, say, that would take our words for its own
            raise Refused("bad_port")
    return url.with_user(None).with_fragment(None)


def is_public(address: Address) -> bool:
    """Whether anyone on the internet may ask this address. IPv4 inside IPv6 (mapped, 6to4, NAT64) counts as itself."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
        if address.is_site_local:  # fec0::/10, private once
            return False
    special = address.is_multicast or address.is_reserved or address.is_unspecified or address.is_link_local
    return address.is_global and not special and not any(address in network for network in _NEVER_ASKED)


def literal_address(host: str) -> Address | None:
    """The address a host spells out, legacy spellings such as 127.1 and 2130706433 included; None for a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        pass
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host))
    except (OSError, ValueError):
        return None
