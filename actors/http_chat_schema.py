"""Bodies that hold a conversation: its messages, its tools."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, PlainValidator, model_validator

from actors.http_formats import Strict
from actors.http_schema import Body
from actors.image_prompt import Chat, Content, ImagePart, template_content
from actors.tool_use import ToolUse
from actors.validation import Options, json_value, template_role
from engine.request import RequestRejected
from engine.tools import Tool

# How closely OpenAI's models look. Here the image's size alone decides: each says the same.
_DETAILS = (None, "auto", "low", "high")


class CalledFunction(Strict):
    name: str
    arguments: str


class MessageToolCall(Strict):
    """A call that the assistant made in an earlier turn."""

    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not isinstance(json_value(self.function.arguments, "messages"), dict):
            raise RequestRejected("messages: the arguments of a tool call must be a JSON object", field="messages")
        return self


def _parse_content(value: object) -> Content:
    """A text, or a list of OpenAI's parts. Raises RequestRejected."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return list(map(_parse_part, value))
    raise RequestRejected("messages: content must be a string or a list of parts", field="messages")


def _parse_part(part: object) -> str | ImagePart:
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    match part:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": "image_url", "image_url": {"url": str(url), **rest}} if rest.get("detail") in _DETAILS:
            return ImagePart(url)
        case {"type": "text"}:
            problem = "a content part of type 'text' must have a text"
        case {"type": "image_url", "image_url": {"url": str()}}:
            problem = "the detail of an image_url must be auto, low or high"
        case {"type": "image_url"}:
            problem = "a content part of type 'image_url' must have an image_url with a url"
        case _:
            problem = f"content of type {str(kind)[:64]!r} is not supported here"
    raise RequestRejected(f"messages: {problem}", field="messages")


class Message(Strict):
    """One turn."""

    role: str
    content: Annotated[Content, PlainValidator(_parse_content, json_schema_input_type=str | list[dict[str, Any]])]
    tool_calls: list[MessageToolCall] = Field(default_factory=list)
    tool_call_id: str = ""

    @model_validator(mode="before")
    @classmethod
    def _prepare(cls, data: object) -> object:
        if not isinstance(data, dict):
            raise RequestRejected("messages must be made of objects with role and content", field="messages")
        for name in ("function_call", "audio"):
            if data.get(name):
                raise RequestRejected(f"messages: {name} is not supported here", field="messages")
        data = {name: value for name, value in data.items() if value is not None or name == "content"}
        if isinstance(role := data.get("role"), str):
            template_role(role)
        if data.get("content") is None and data.get("tool_calls"):
            return {**data, "content": ""}
        return data

    @model_validator(mode="after")
    def _check_role(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise RequestRejected("messages: only the assistant has tool_calls", field="messages")
        return self

    def for_template(self) -> dict[str, object]:
        """In OpenAI's form, with the role that chat templates know."""
        role = template_role(self.role)
        message: dict[str, object] = {"role": role, "content": template_content(role, self.content)}
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        if self.tool_call_id:
            message["tool_call_id"] = self.tool_call_id
        return message


class FunctionDefinition(Strict):
    # `strict` changes nothing here: where a call is forced, it keeps to its schema.
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class ToolDefinition(Strict):
    type: Literal["function"]
    function: FunctionDefinition

    def tool(self) -> Tool:
        function = self.function
        if function.parameters is None:
            return Tool(function.name, function.description or "")
        return Tool(function.name, function.description or "", function.parameters)


class NamedTool(Strict):
    name: str


Mode = Literal["auto", "none", "required"]
_MODES: tuple[Mode, ...] = ("auto", "none", "required")


def _parse_tool_choice(value: object) -> Mode | NamedTool:
    """A mode, or the tool of OpenAI's object. Raises RequestRejected."""
    for mode in _MODES:
        if value == mode:
            return mode
    if isinstance(value, dict) and value.get("type") == "function":
        function = value.get("function")
        if isinstance(function, dict) and isinstance(name := function.get("name"), str):
            return NamedTool(name=name)
    raise RequestRejected(
        'tool_choice must be "auto", "none", "required" or {"type": "function", "function": {"name": ...}}',
        field="tool_choice",
    )


class Conversation(Strict):
    """A conversation and its tools."""

    messages: list[Message] = Field(default_factory=list)
    tools: list[ToolDefinition] = Field(default_factory=list)
    tool_choice: Annotated[
        Mode | NamedTool, PlainValidator(_parse_tool_choice, json_schema_input_type=str | dict[str, Any])
    ] = "auto"
    parallel_tool_calls: bool = True

    def tool_use(self) -> ToolUse:
        """Raises RequestRejected."""
        tools = tuple(definition.tool() for definition in self.tools)
        choice, parallel = self.tool_choice, self.parallel_tool_calls
        if isinstance(choice, NamedTool):
            return ToolUse(tools, "named", choice.name, parallel)
        return ToolUse(tools, choice, parallel=parallel)

    def conversation(self) -> Chat:
        """As chat templates take it. Raises RequestRejected."""
        images = [part for message in self.messages for part in message.content if isinstance(part, ImagePart)]
        return Chat([message.for_template() for message in self.messages], images)


class ChatBody(Body, Conversation):
    """POST /v1/chat/completions."""

    messages: list[Message]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestRejected("top_logprobs needs logprobs to be true", field="top_logprobs")
        return self

    def options(self, deadline: float | None) -> Options:
        """`deadline` in Unix seconds. Raises RequestRejected."""
        max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self._options(deadline, max_tokens, logprobs, self.prompt_logprobs)
