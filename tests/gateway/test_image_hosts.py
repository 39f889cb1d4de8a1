"""Which addresses are public, and which hosts the configuration lets images come from."""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.image_hosts import AllowedHost, HostRules, UrlRefused, is_public
from cluster.config_errors import ConfigError

# ---- Addresses

# RFC 6890 and its successors, and what leads to them.
INSIDE = [
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
    "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
    "224.0.0.0/4", "240.0.0.0/4", "255.255.255.255/32", "168.63.129.16/32",
    "::/96", "::1/128", "100::/64", "2001::/32", "2001:db8::/32", "2002::/16", "3fff::/20", "5f00::/16", "fc00::/7",
    "fe80::/10", "fec0::/10", "ff00::/8", "64:ff9b:1::/48",
]  # fmt: skip


@given(st.sampled_from(INSIDE).flatmap(lambda network: st.ip_addresses(network=network)))
def test_addresses_of_the_inside(address: IPv4Address | IPv6Address) -> None:
    assert not is_public(address)


@given(st.ip_addresses(v=4))
def test_an_address_within_another_counts_as_itself(address: IPv4Address) -> None:
    number = int(address)
    inside = any(address in ip_network(network) for network in INSIDE if ":" not in network)
    assert is_public(address) != inside
    assert is_public(IPv6Address((0xFFFF << 32) | number)) != inside  # IPv4-mapped
    assert is_public(IPv6Address((0x64FF9B << 96) | number)) != inside  # NAT64


def test_addresses_of_the_web() -> None:
    for address in ("93.184.215.14", "1.1.1.1", "2606:2800:21f:cb07::1", "2a00:1450:4001::200e"):
        assert is_public(ip_address(address))


# ---- Hosts

ANYWHERE = HostRules()
LISTED = HostRules.parse(
    ["example.org", "*.cdn.example", "store.test:9000", "[fd00::5]:9000", "10.0.0.5", "bücher.example"]
)


@pytest.mark.parametrize(
    ("url", "private"),
    [
        ("https://example.org/a.png", False),
        ("http://EXAMPLE.org.:80/a.png", False),
        ("https://eu.a.cdn.example/a", False),
        ("https://xn--bcher-kva.example/", False),
        ("http://store.test:9000/a", True),
        ("http://[fd00:0:0::5]:9000/a", True),
        ("http://10.0.0.5/a", False),
    ],
)
def test_listed_hosts(url: str, private: bool) -> None:
    assert LISTED.check(httpx.URL(url)) is private


@pytest.mark.parametrize(
    "url",
    [
        "http://evilexample.org/", "http://example.org.evil.com/", "http://a.example.org/", "http://cdn.example/",
        "http://acdn.example/", "http://store.test/", "http://store.test:9001/", "http://example.org:9000/",
        "http://example.org:22/", "http://[fd00::5]/", "http://example.org%00.evil.com/",
    ],
)  # fmt: skip
def test_hosts_that_are_not_listed(url: str) -> None:
    with pytest.raises((UrlRefused, httpx.InvalidURL)):
        LISTED.check(httpx.URL(url))


@pytest.mark.parametrize("port", [0, 21, 22, 25, 6379, 8000, 8080, 8265, 65535])
def test_ports_of_other_services(port: int) -> None:
    with pytest.raises(UrlRefused, match="is of a port"):
        ANYWHERE.check(httpx.URL(f"http://example.org:{port}/"))


@pytest.mark.parametrize(
    "entry", ["", "*", "*.", "*.*.a", "a b", "http://a", "a/b", "10.0.0.0/8", "me@a", "a:b", "a?b"]
)
def test_entries_that_are_no_hosts(entry: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"vision.url_hosts: {entry!r} must be")):
        AllowedHost.parse(entry)
