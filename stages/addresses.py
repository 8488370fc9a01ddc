"""Which network addresses strangers' URLs may lead to: the internet's, and nothing of ours.

A name is checked after it was looked up, and the very address that was checked is connected to, so that a name server
that answers differently the second time (DNS rebinding) gains nothing.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from concurrent.futures import ThreadPoolExecutor

from aiohttp.abc import AbstractResolver, ResolveResult

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# Azure's metadata service answers on a public address; every other cloud's is link-local, private or shared.
_METADATA_ADDRESSES = (ipaddress.ip_address("168.63.129.16"),)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class BlockedAddress(Exception):
    """A host none of whose addresses is public. Not an OSError, which aiohttp would wrap."""


class CheckedResolver(AbstractResolver):
    """Looks names up and hands out checked addresses alone; aiohttp connects to exactly what it is given here."""

    def __init__(self, *, allow_private_hosts: bool, threads: int) -> None:
        self._any_address = allow_private_hosts
        # The event loop's own pool has cores + 4 threads, which a few dead name servers block for minutes.
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="resolve")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Public addresses of `host`. Raises OSError as getaddrinfo does, BlockedAddress when none is public."""
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
            raise BlockedAddress(host)
        return allowed

    async def close(self) -> None:
        """Lets go of the threads without waiting for look-ups that hang."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def is_public(address: Address) -> bool:
    """Whether anyone on the internet may ask this address. IPv4 inside IPv6 (mapped, 6to4, NAT64) counts as itself."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
    special = address.is_multicast or address.is_reserved or address.is_unspecified or address.is_link_local
    return address.is_global and not special and address not in _METADATA_ADDRESSES


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
