"""What is said about a configuration that cannot be used: one sentence for each fault, which names the dotted field."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel


class ConfigError(ValueError):
    """A configuration that cannot be used. `problems` has one sentence for each fault; `str()` a line for each."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.problems,)


def sentences(fault: Mapping[str, Any], schema: type[BaseModel]) -> Sequence[str]:
    """One of pydantic's errors about data for `schema`, in the words of the file's users."""
    key = ".".join(str(part) for part in fault["loc"])
    given = fault["input"]
    context = fault.get("ctx", {})
    match fault["type"]:
        case "value_error" if isinstance(context["error"], ConfigError):
            return context["error"].problems
        case "extra_forbidden":
            rule = f"is not a known key; the nearest is {nearest_key(key, schema)}"
        case "missing":
            rule = "is required"
        case "greater_than_equal":
            rule = f"must be at least {context['ge']:g}, not {given!r}"
        case "less_than_equal":
            rule = f"must be at most {context['le']:g}, not {given!r}"
        case "greater_than":
            rule = f"must be above {context['gt']:g}, not {given!r}"
        case "literal_error":
            rule = f"must be {context['expected']}, not {given!r}"
        case "int_type" | "int_from_float":
            rule = f"must be a whole number, not {given!r}"
        case "float_type":
            rule = f"must be a number, not {given!r}"
        case "model_type" | "dict_type":
            rule = f"must be a mapping, not {given!r}"
        case "string_too_short":
            rule = "must not be empty"
        case "string_type" | "path_type":
            rule = f"must be text, not {given!r}"
        case _:
            rule = f"is invalid: {fault['msg']}, not {given!r}"
    return [f"{key} {rule}"]


def nearest_key(key: str, schema: type[BaseModel]) -> str:
    """The dotted key of `schema` that is most like `key`: by the whole, or by the last part where that fits better."""
    last = key.rpartition(".")[2]

    def likeness(known: str) -> float:
        whole = difflib.SequenceMatcher(None, key, known).ratio()
        part = difflib.SequenceMatcher(None, last, known.rpartition(".")[2]).ratio()
        return whole + part

    return max(_known_keys(schema), key=likeness)


def _known_keys(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in schema.model_fields.items():
        yield prefix + name
        for kind in get_args(info.annotation) or (info.annotation,):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _known_keys(kind, f"{prefix}{name}.")
