"""Tools that a conversation offers: what they are, the calls that come of them, and a grammar that forces calls.

`engine/tool_parser.py` finds the calls in the text that the model writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from engine.grammar import MAX_SOURCE, validate
from engine.request import Grammar, RequestRejected

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. `parameters`: the JSON schema of its arguments, an object's.

    Raises RequestRejected (field "tools") for a name or a schema that cannot be used.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, object] = field(default_factory=lambda: {"type": "object", "properties": {}})

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise RequestRejected(
                f"tools: the function name {self.name!r} must be 1 to 64 of A-Z, a-z, 0-9, _, - and .", field="tools"
            )
        if self.parameters.get("type", "object") != "object":
            raise RequestRejected(f"tools: the parameters of {self.name!r} must be of type object", field="tools")

    def definition(self) -> dict[str, object]:
        """OpenAI's form, which chat templates take: `{"type": "function", "function": {"name": ...}}`."""
        function: dict[str, object] = {"name": self.name, "parameters": dict(self.parameters)}
        if self.description:
            function["description"] = self.description
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model made. `arguments`: the text of a JSON object."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """More text that is no call."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins; `index` counts the answer's calls from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments: the pieces, joined, are the text of a JSON object."""

    index: int
    text: str


ToolEvent = ContentDelta | CallStart | CallArguments


def tool_grammar(tools: Sequence[Tool], name: str | None = None, parallel: bool = True) -> Grammar:
    """A grammar whose every sentence is one call or, if `parallel`, one or more; to `name` if given, else to any tool.

    Arguments fit the tool's JSON schema. Takes up to a second for large schemas. Raises RequestRejected: field
    "tool_choice" for a name that is not offered; "tools" when there are none, or their schemas cannot be enforced.
    """
    if not tools:
        raise RequestRejected("tools must not be empty when a call is asked for", field="tools")
    chosen = [tool for tool in tools if name is None or tool.name == name]
    if not chosen:
        raise RequestRejected(f"tool_choice names {name!r}, which is not among the tools", field="tool_choice")
    rules = ['start: call ("\\n" call)*' if parallel else "start: call"]
    rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(chosen))))
    for i, tool in enumerate(chosen):
        schema = _arguments_schema(tool)
        opening = '{"name": ' + json.dumps(tool.name) + ', "parameters": '
        rules.append(f'call_{i}: {json.dumps(opening)} arguments_{i} "}}"')
        rules.append(f"arguments_{i}: %json {schema}")
    source = "\n".join(rules)
    if len(source) > MAX_SOURCE:
        raise RequestRejected(f"tools: their schemas are longer than {MAX_SOURCE} characters", field="tools")
    return Grammar("lark", source)


# As the bundled model's chat template and most others write JSON: no room for white space without end.
_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_OPEN_ENDED = {"additionalProperties", "patternProperties", "unevaluatedProperties", "$ref", "allOf", "anyOf", "oneOf"}
# Data of the user's, whatever its keys are called.
_DATA = {"const", "enum", "default", "examples"}


def _arguments_schema(tool: Tool) -> str:
    """The schema as JSON text, without arguments that it does not list. Raises RequestRejected (field "tools")."""
    subject = f"tools: the schema of {tool.name!r}"
    try:
        schema = {"type": "object", **_without_prose(tool.parameters), "x-guidance": _LAYOUT}
        if "properties" in schema and not _OPEN_ENDED & schema.keys():
            schema["additionalProperties"] = False
        text = json.dumps(schema)
    except (ValueError, TypeError, RecursionError) as error:
        raise RequestRejected(f"{subject} is not JSON: {error}", field="tools") from error
    validate(Grammar("json_schema", text), field="tools", subject=subject)
    return text


def _without_prose(schema: Mapping[str, object]) -> dict[str, object]:
    """A JSON schema without titles and descriptions, which can be long. (A property of that name is no string.)"""

    def strip(key: str, value: object) -> object:
        if isinstance(value, Mapping) and key not in _DATA:
            return _without_prose(value)
        if isinstance(value, list | tuple) and key not in _DATA:
            return [strip("", item) for item in value]
        return value

    kept = {k: v for k, v in schema.items() if not (k in ("title", "description") and isinstance(v, str))}
    return {key: strip(key, value) for key, value in kept.items()}
