"""Where images may be fetched from: the configured hosts, and no address that only insiders reach."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Self

import httpx

from cluster.config_errors import ConfigError

_WEB_PORTS = {"http": 80, "https": 443}
_GLOBAL_UNICAST = ip_network("2000::/3")
_NAT64 = ip_network("64:ff9b::/96")  # RFC 6052: the last 32 bits are an IPv4 address
# What ipaddress takes for public, and is not for us.
_NOT_PUBLIC = tuple(
    map(
        ip_network,
        (
            "168.63.129.16/32",  # Azure's own services, from within its machines
            "192.0.0.0/24",  # RFC 6890: for protocols
            "192.88.99.0/24",  # RFC 7526: was for relays to 6to4
            "2002::/16",  # RFC 3056: 6to4, leads to any IPv4 address
            "3fff::/20",  # RFC 9637: for documentation
        ),
    )
)


class UrlRefused(ValueError):
    """A URL that is not fetched. The message says why, as the end of a sentence that begins with the URL."""


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether everybody may reach it: not private, shared, local, multicast, reserved, nor a way to such a one."""
    if isinstance(address, IPv6Address):
        embedded = address.ipv4_mapped
        if address in _NAT64:
            embedded = IPv4Address(int(address) & 0xFFFFFFFF)
        if embedded is not None:
            return is_public(embedded)
        if address not in _GLOBAL_UNICAST:
            return False
    return address.is_global and not address.is_multicast and not any(address in network for network in _NOT_PUBLIC)


@dataclass(frozen=True, slots=True)
class AllowedHost:
    """`host` itself, or (`below`) all names that end in it; at `port`, or at the port of its scheme (None)."""

    host: str
    below: bool
    port: int | None

    @classmethod
    def parse(cls, entry: str) -> Self:
        """Of `name`, `*.name`, an IPv4 address or a bracketed IPv6 address, each with or without `:port`."""
        problem = f"vision.url_hosts: {entry!r} must be a host, *.domain, host:port or *.domain:port"
        try:
            url = httpx.URL(f"//{entry.removeprefix('*.')}")
        except httpx.InvalidURL:
            raise ConfigError([problem]) from None
        host, more = host_of(url), (url.userinfo, url.raw_path.strip(b"/"), url.fragment)
        if not host or set("*%") & set(host) or any(more):
            raise ConfigError([problem])
        return cls(host, entry.startswith("*."), url.port)

    def holds(self, host: str, port: int) -> bool:
        named = host.endswith(f".{self.host}") if self.below else host == self.host
        return named and self.port in (None, port)


@dataclass(frozen=True, slots=True)
class HostRules:
    """What `vision.url_hosts` says. No entries: any public host.

    An entry that names its port is taken to be meant: only such a one may lead to an address that is not public (an
    image store of one's own), or to another port than its scheme's.
    """

    entries: tuple[AllowedHost, ...] = ()

    @classmethod
    def parse(cls, entries: Iterable[str]) -> Self:
        """Raises ConfigError for an entry that is no host."""
        return cls(tuple(map(AllowedHost.parse, entries)))

    def check(self, url: httpx.URL) -> bool:
        """Whether `url` may lead to a private address. Raises UrlRefused when it may not be fetched at all."""
        if url.userinfo:
            raise UrlRefused("has a user name or a password, which are not sent")
        if not (host := host_of(url)):
            raise UrlRefused("names no host")
        port = _WEB_PORTS[url.scheme] if url.port is None else url.port
        fitting = [entry for entry in self.entries if entry.holds(host, port)]
        if any(entry.port is not None for entry in fitting):
            return True
        if self.entries and not fitting:
            raise UrlRefused("is of a host that this server fetches no images from")
        if port not in _WEB_PORTS.values():
            raise UrlRefused("is of a port that this server fetches no images from")
        return False


def host_of(url: httpx.URL) -> str:
    """The host in one spelling: ASCII, small letters, no dot at the end; addresses in their shortest form."""
    host = url.raw_host.decode("ascii").lower().rstrip(".")
    try:
        return str(ip_address(host))
    except ValueError:
        return host
