"""Which addresses may be connected to: public ones, and of the others only what the user allows.

The check stands where the socket is made, so it sees the very address of the connection: whatever the URL, the name
server or a redirect said before. Addresses that carry another one inside (IPv4 in IPv6, 6to4, NAT64) are judged
by both.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

from penstock.errors import PlanError

__all__ = ["Address", "Guard", "canonical_host", "is_public", "literal"]

Address = IPv4Address | IPv6Address
_Network = IPv4Network | IPv6Network

_NAT64 = IPv6Network("64:ff9b::/96")
_COMPATIBLE = IPv6Network("::/96")
_NEVER_PUBLIC: tuple[_Network, ...] = (
    IPv4Network("100.64.0.0/10"),  # carrier-grade NAT, and a cloud's metadata
    IPv4Network("168.63.129.16/32"),  # a cloud's metadata on a public address
    IPv4Network("192.88.99.0/24"),  # 6to4 relays
    IPv6Network("64:ff9b:1::/48"),  # NAT64 of one's own network, which puts the other address anywhere
    IPv6Network("fec0::/10"),  # site-local, as private as its successor
)


def literal(host: str) -> Address | None:
    """The address that ``host`` is, in any form that a resolver takes; None if it is a name.

    >>> literal("0x7f.1"), literal("example.com")
    (IPv4Address('127.0.0.1'), None)
    """
    host = host.strip("[]").partition("%")[0]  # a scope says through which interface, not to where
    try:
        return ip_address(host)
    except ValueError:
        pass
    labels = host.rstrip(".").rpartition(".")[2]
    if not labels[:1].isdigit() or " " in host:  # inet_aton takes anything behind a blank
        return None
    try:
        return IPv4Address(socket.inet_aton(host.rstrip(".")))
    except (OSError, ValueError):
        return None


@lru_cache(1024)
def canonical_host(host: str) -> str | None:
    """The usual form of an address in an odd one (``2130706433``, ``0x7f.1``, ``127.1``); None if there is none.

    >>> canonical_host("2130706433"), canonical_host("127.0.0.1")
    ('127.0.0.1', None)
    """
    if not host[:1].isdigit():
        return None
    address = literal(host)
    return str(address) if isinstance(address, IPv4Address) and str(address) != host else None


def is_public(address: Address) -> bool:
    """Whether everybody sees the same machine at this address.

    >>> [is_public(ip_address(text)) for text in ("1.1.1.1", "10.0.0.1", "169.254.169.254", "::ffff:127.0.0.1")]
    [True, False, False, False]
    """
    inner = _inside(address)
    if inner is not None:
        return is_public(inner)
    if any(address in network for network in _NEVER_PUBLIC if network.version == address.version):
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def _inside(address: Address) -> Address | None:
    """The IPv4 address that an IPv6 address stands for."""
    if isinstance(address, IPv4Address):
        return None
    inner = address.ipv4_mapped or address.sixtofour
    if inner is not None:
        return inner
    low = int(address) & 0xFFFF_FFFF
    if address in _NAT64 or (address in _COMPATIBLE and low > 0xFFFF):
        return IPv4Address(low)
    return None


class Guard:
    """Says which addresses are refused. ``allow``: False, True (nothing is refused), or networks such as "10.0.0.0/8".

    Raises PlanError for what is no network.
    """

    def __init__(self, allow: Any = False) -> None:
        self.open = allow is True
        self.networks: tuple[_Network, ...] = ()
        if isinstance(allow, bool):
            return
        if isinstance(allow, str) or not isinstance(allow, Iterable):
            raise PlanError(f"allow_private={allow!r}", 'Give True, or a list of networks: ["10.0.0.0/8", "::1/128"]')
        try:
            self.networks = tuple(ip_network(network) for network in allow)
        except ValueError as error:
            raise PlanError(f"allow_private={allow!r}: {error}", 'Give networks such as "10.0.0.0/8"') from None

    def refuses(self, host: str) -> bool:
        """Whether a connection to this address mustn't be made; what can't be read as one is refused."""
        if self.open:
            return False
        address = literal(host)
        if address is None:
            return True
        if is_public(address):
            return False
        return not any(self._allows(form) for form in (address, _inside(address)) if form is not None)

    def _allows(self, address: Address) -> bool:
        return any(address.version == network.version and address in network for network in self.networks)
