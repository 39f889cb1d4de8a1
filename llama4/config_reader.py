"""Typed reading of a checkpoint's config.json, with errors that name the file and the key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

_Value = TypeVar("_Value", int, float, bool)


def read_config(file: Path) -> Mapping[str, object]:
    """The JSON object in `file`. Raises ValueError, naming it, when it is missing or broken."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file} does not exist: {file.parent} is not a checkpoint directory") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold a JSON object")
    return values


class ConfigReader:
    """Typed access to a JSON object; a null counts as a missing key. Every error names the source and the key."""

    def __init__(self, values: Mapping[str, object], source: str) -> None:
        self._values = values
        self.source = source

    def section(self, key: str) -> ConfigReader:
        """The object at `key`; when there is none, one without keys."""
        value = self._values.get(key)
        return ConfigReader(value if isinstance(value, Mapping) else {}, f"{self.source}: {key}")

    def get(self, key: str, default: object) -> object:
        value = self._values.get(key)
        return default if value is None else value

    def is_null(self, key: str) -> bool:
        return key in self._values and self._values[key] is None

    def check(self, key: str, ok: bool, rule: str) -> None:
        if not ok:
            raise ValueError(f"{self.source}: {key} must {rule}, not {self._values.get(key)!r}")

    def _required(self, key: str, default: _Value | None) -> object:
        value = self.get(key, default)
        if value is None:
            raise ValueError(f"{self.source}: {key} is missing")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive whole number."""
        value = self._required(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{self.source}: {key} must be a positive whole number, not {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number of 0 or more."""
        value = self._required(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value >= 0:
            raise ValueError(f"{self.source}: {key} must be a number of 0 or more, not {value!r}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._required(key, default)
        if not isinstance(value, bool):
            raise ValueError(f"{self.source}: {key} must be true or false, not {value!r}")
        return value

    def integers(self, key: str) -> list[int] | None:
        value = self.get(key, None)
        if value is None:
            return None
        if not isinstance(value, list | tuple) or not all(isinstance(item, int) for item in value):
            raise ValueError(f"{self.source}: {key} must be a list of whole numbers, not {value!r}")
        return list(value)

    def strings(self, key: str) -> list[str] | None:
        value = self.get(key, None)
        if value is None:
            return None
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"{self.source}: {key} must be a list of strings, not {value!r}")
        return list(value)
