"""API keys: who may ask."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from cluster.config import ConfigError, GatewayConfig

_SCHEME = "bearer "
REFUSAL = "a valid API key is needed: send it as `Authorization: Bearer KEY`"


@dataclass(frozen=True, slots=True)
class ApiKeys:
    """The keys that are let in, as SHA-256 digests; none lets everybody in."""

    digests: tuple[bytes, ...] = ()

    @classmethod
    def of(cls, keys: Iterable[str]) -> Self:
        return cls(tuple(_digest(key) for key in keys))

    def admit(self, authorization: str | None) -> bool:
        """Whether a request with this `Authorization` header is let in. Takes the same time for any wrong key."""
        if not self.digests:
            return True
        given = authorization or ""
        digest = _digest(given[len(_SCHEME) :].strip())
        known = [hmac.compare_digest(digest, other) for other in self.digests]
        return any(known) and given[: len(_SCHEME)].lower() == _SCHEME


NO_KEYS = ApiKeys()


def read_keys(gateway: GatewayConfig) -> list[str]:
    """Those of `api_keys` and `api_keys_file`. Raises ConfigError for a file that cannot be read or has none."""
    keys = [key.get_secret_value().strip() for key in gateway.api_keys]
    file = gateway.api_keys_file
    if file is None:
        return keys
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"gateway.api_keys_file: {file} cannot be read: {error}"]) from None
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:  # an empty file must not open the door
        raise ConfigError([f"gateway.api_keys_file: {file} holds no key"])
    return keys + found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()
