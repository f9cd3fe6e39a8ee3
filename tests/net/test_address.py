"""Which addresses are public: the registries' special ranges, in every form that an address can have."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import PlanError
from penstock.net.address import Guard, canonical_host, is_public, literal

PRIVATE = [
    "0.0.0.0", "0.1.2.3", "10.0.0.1", "10.255.255.255", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.0.1",
    "169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.1", "192.0.2.1", "192.88.99.1", "192.168.1.1",
    "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255",
    "168.63.129.16", "::", "::1", "fe80::1", "fe80::1%eth0", "fec0::1", "fc00::1", "fd00:ec2::254", "ff02::1",
    "2001:db8::1", "100::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "2002:7f00:1::",
    "2002:a00:1::1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::808:808", "::127.0.0.1", "::10.0.0.1",
]  # fmt: skip
PUBLIC = ["1.1.1.1", "8.8.8.8", "172.15.0.1", "172.32.0.1", "100.63.0.1", "100.128.0.1", "192.167.1.1", "9.9.9.9",
          "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"]  # fmt: skip
ODD = ["2130706433", "0x7f000001", "017700000001", "127.1", "0x7f.1", "127.0.1", "0177.0.0.01", "127.0.0.1."]


@pytest.mark.parametrize("host", [*PRIVATE, *ODD])
def test_what_isn_t_public_is_refused(host: str) -> None:
    assert Guard().refuses(host)
    assert not Guard(True).refuses(host)


@pytest.mark.parametrize("host", PUBLIC)
def test_what_is_public_is_admitted(host: str) -> None:
    assert not Guard().refuses(host)


@pytest.mark.parametrize("host", ["example.com", "", "1.2.3.4.5", "1e3.com", "999.1.1.1", "127.0.0.1 x"])
def test_what_is_no_address_never_reaches_a_socket(host: str) -> None:
    assert Guard().refuses(host)
    assert Guard(["0.0.0.0/0"]).refuses(host)


@given(st.integers(0, 2**32 - 1))
def test_an_address_inside_another_is_judged_alike(number: int) -> None:
    inner = IPv4Address(number)
    public = is_public(inner)
    assert is_public(IPv6Address(f"::ffff:{inner}")) == public
    assert is_public(IPv6Address((0x2002 << 112) | (number << 80) | 1)) == public
    assert is_public(IPv6Address((0x64FF9B << 96) | number)) == public
    assert literal(hex(number)) == inner
    assert literal(str(number)) == inner
    assert canonical_host(str(inner)) is None


def test_networks_are_let_in_by_name() -> None:
    guard = Guard(["10.0.0.0/8", "fd00::/8"])
    assert not any(map(guard.refuses, ["10.1.2.3", "::ffff:10.1.2.3", "64:ff9b::a01:203", "fd00::7", "8.8.8.8"]))
    assert all(map(guard.refuses, ["192.168.0.1", "127.0.0.1", "fe80::1", "::1"]))


@pytest.mark.parametrize("wrong", ["10.0.0.0/8", ["10.0.0.1/8"], ["intern"], 7, [None]])
def test_what_is_no_network_is_refused(wrong: Any) -> None:
    with pytest.raises(PlanError, match="allow_private="):
        Guard(wrong)
