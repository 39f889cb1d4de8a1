"""The tools of a conversation, as a client offers them: what the prompt, the sampler and the parser make of them."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from engine.request import Grammar, RequestRejected
from engine.tool_parser import ToolParser
from engine.tools import CallArguments, CallStart, Tool, ToolCall, tool_grammar

MAX_TOOLS = 128

CallEvent = CallStart | CallArguments


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Tools, and whether they are called.

    `choice` "auto" leaves it to the model, "none" keeps the tools out of the prompt, "required" forces a call to any of
    them and "named" one to `name`. Not `parallel`: at most one call in an answer; more of them are dropped.
    Raises RequestRejected, naming `tools` or `tool_choice`.
    """

    tools: tuple[Tool, ...] = ()
    choice: Literal["auto", "none", "required", "named"] = "auto"
    name: str | None = None
    parallel: bool = True

    def __post_init__(self) -> None:
        names = self.names
        if len(self.tools) > MAX_TOOLS:
            raise RequestRejected(f"tools must be at most {MAX_TOOLS}, not {len(self.tools)}", field="tools")
        if len(names) < len(self.tools):
            raise RequestRejected("tools: two of them have the same name", field="tools")
        if not self.tools and self.forced:
            raise RequestRejected("tool_choice needs tools", field="tool_choice")
        if self.choice == "named" and self.name not in names:
            raise RequestRejected(f"tool_choice: {str(self.name)[:64]!r} is none of the tools", field="tool_choice")

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tool.name for tool in self.tools)

    @property
    def offered(self) -> tuple[Tool, ...]:
        """The tools that the model is told of."""
        return () if self.choice == "none" else self.tools

    @property
    def forced(self) -> bool:
        """Whether the answer has to be a call."""
        return self.choice in ("required", "named")

    def constrain(self, grammar: Grammar | None) -> Grammar | None:
        """What the answer's text must look like, where the client asks for `grammar`. Takes up to a second if `forced`.

        Raises RequestRejected.
        """
        if grammar is not None and self.offered:
            raise RequestRejected(
                "response_format cannot be used together with tools, unless tool_choice is none",
                field="response_format",
            )
        return tool_grammar(self.tools, self.name, self.parallel) if self.forced else grammar

    def parser(self) -> ToolParser | None:
        """Finds the calls in one answer; None when there can be none."""
        return ToolParser(self.names, lambda _: f"call_{uuid.uuid4().hex[:24]}") if self.offered else None

    def keep(self, event: CallEvent) -> bool:
        """Whether this part of a call is passed on."""
        return self.parallel or event.index == 0


def join_calls(events: Iterable[CallEvent]) -> Sequence[ToolCall]:
    """Whole calls of their pieces, in order."""
    starts: dict[int, CallStart] = {}
    arguments: dict[int, str] = {}
    for event in events:
        if isinstance(event, CallStart):
            starts[event.index] = event
        else:
            arguments[event.index] = arguments.get(event.index, "") + event.text
    return [ToolCall(start.id, start.name, arguments.get(index, "")) for index, start in starts.items()]
