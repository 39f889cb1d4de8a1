"""Finds tool calls in the text that Llama 4 writes, also while it is being written.

A call is `[get_weather(city="Paris"), ...]` or `{"name": "get_weather", "parameters": {"city": "Paris"}}` (`arguments`
will do, and a list of these), with any text before, between and after, bare or between `<|python_start|>` and
`<|python_end|>`. What is no such call is ordinary text. `engine/literals.py` reads the values.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection

from engine.literals import Reader, Reading, Unreadable, Value
from engine.tools import CallArguments, CallStart, ContentDelta, ToolCall, ToolEvent

_START_TAG, _END_TAG = "<|python_start|>", "<|python_end|>"
# Where something other than ordinary text may begin.
_OPENING = re.compile(r"[\[{<]")
# What may stand beside a call without being content: before the first one, and after one.
_BEFORE, _AFTER = " \t\r\n", " \t\r\n;,"
_ARGUMENT_NAME = re.compile(r"[\w.-]*")


def parse(text: str, names: Collection[str], make_id: Callable[[int], str]) -> tuple[str, tuple[ToolCall, ...]]:
    """A whole answer: the text that is no call, and the calls. See `ToolParser`."""
    parser = ToolParser(names, make_id)
    content: list[str] = []
    heads: list[CallStart] = []
    arguments: list[str] = []
    for event in [*parser.push(text), *parser.finish()]:
        match event:
            case ContentDelta():
                content.append(event.text)
            case CallStart():
                heads.append(event)
            case CallArguments():
                arguments.append(event.text)
    calls = zip(heads, arguments, strict=True)
    return "".join(content), tuple(ToolCall(head.id, head.name, text) for head, text in calls)


class ToolParser:
    """The same while the text comes: however it is cut into pieces, the events, joined, are what `parse` finds.

    `names`: the functions on offer; a call to any other is ordinary text. `make_id(index)` gives a call its id.
    A call's CallStart and its CallArguments come together, when the call is complete: before that it may still turn
    out to be ordinary text. Text is held back only as long as it may become a call. White space and tags around calls
    are dropped, and so is what separates calls (`;`, `,`), where nothing else stands beside them.
    """

    def __init__(self, names: Collection[str], make_id: Callable[[int], str]) -> None:
        self._names = frozenset(names)
        self._make_id = make_id
        self._reader = Reader()
        self._events: list[ToolEvent] = []
        self._calls = 0
        self._reading = self._answer()

    def push(self, text: str) -> list[ToolEvent]:
        """Take more text; returns what is certain by now."""
        self._reader.feed(text)
        return self._advance()

    def finish(self) -> list[ToolEvent]:
        """No more text comes: returns the rest."""
        self._reader.end()
        return self._advance()

    def _advance(self) -> list[ToolEvent]:
        next(self._reading, None)
        events, self._events = self._events, []
        return events

    def _answer(self) -> Reading[None]:
        """The whole answer. Text from `reader.kept` to `reader.position` is dropped if a call follows."""
        reader = self._reader
        beside = _BEFORE
        while True:
            reader.trim()
            following = yield from reader.peek()
            if not following:
                break
            if following in beside:
                reader.position += 1
            elif following == "<" and (yield from self._tag(after_call=beside == _AFTER)):
                beside = beside or _BEFORE
            elif following in "[{" and (yield from self._calls_at_opening()):
                beside = _AFTER
            else:
                opening = _OPENING.search(reader.text, reader.position + 1)
                reader.position = opening.start() if opening else len(reader.text)
                self._release()
                beside = ""
        if beside != _AFTER:
            self._release()

    def _release(self) -> None:
        """What has been read is ordinary text."""
        text = self._reader.text[self._reader.kept : self._reader.position]
        self._reader.kept = self._reader.position
        if text:
            self._events.append(ContentDelta(text))

    def _tag(self, after_call: bool) -> Reading[bool]:
        """Whether a tag comes next that may stand beside a call, and if so reads it. One that closes a call is gone."""
        reader = self._reader
        if (yield from reader.begins_with(_START_TAG)):
            return True
        if after_call and (yield from reader.begins_with(_END_TAG)):
            reader.kept = reader.position
            return True
        return False

    def _calls_at_opening(self) -> Reading[bool]:
        """The call or the list of calls that begins here; False, with nothing read, when there is none.

        Calls of a list count from the comma or bracket after them on, even if the list does not go on well.
        """
        reader = self._reader
        begin, calls_before = reader.position, self._calls
        try:
            if (yield from reader.peek()) == "{":
                self._commit(*(yield from self._json_call()))
                return True
            yield from reader.expect("[")
            while True:
                json_form = (yield from reader.space()) == "{"
                call = yield from (self._json_call() if json_form else self._python_call())
                separator = yield from reader.expect(",]")
                reader.position -= 1
                self._commit(*call)
                reader.position += 1
                if separator == "]" or (yield from reader.space()) == "]":
                    break
            reader.position += separator == ","
            reader.kept = reader.position
            return True
        except Unreadable:
            some = self._calls > calls_before
            reader.position = reader.kept if some else begin
            return some

    def _commit(self, name: str, arguments: str) -> None:
        """A call has been read."""
        self._reader.kept = self._reader.position
        index, self._calls = self._calls, self._calls + 1
        self._events.append(CallStart(index, self._make_id(index), name))
        self._events.append(CallArguments(index, arguments))

    def _python_call(self) -> Reading[tuple[str, str]]:
        """`name(argument=literal, ...)`"""
        reader = self._reader
        name = yield from reader.one_of(self._names, end="( \t\r\n")
        yield from reader.expect("(")
        arguments: dict[str, Value] = {}
        while (yield from reader.space()) != ")":
            argument = yield from reader.run(_ARGUMENT_NAME)
            if not argument or argument[0].isdigit() or argument in arguments:
                raise Unreadable
            yield from reader.expect("=")
            arguments[argument] = yield from reader.value(python=True)
            if (yield from reader.expect(",)")) == ")":
                return name, _to_json(arguments)
        reader.position += 1
        return name, _to_json(arguments)

    def _json_call(self) -> Reading[tuple[str, str]]:
        """`{"name": ..., "parameters": {...}}`, in any order."""
        reader = self._reader
        yield from reader.expect("{")
        keys = {"type", "name", "parameters", "arguments"}
        name: str | None = None
        arguments: str | None = None
        closed = False
        while not closed:
            key = yield from self._quoted(keys)
            keys -= {"parameters", "arguments"} if key in ("parameters", "arguments") else {key}
            yield from reader.expect(":")
            if key == "name":
                name = yield from self._quoted(self._names)
            elif key == "type":
                yield from self._quoted({"function"})
            else:
                yield from reader.space()
                begin = reader.position
                value = yield from reader.value(python=False)
                if not isinstance(value, dict):
                    raise Unreadable
                text = reader.text[begin : reader.position]
                arguments = text if _is_json(text) else _to_json(value)
            closed = (yield from reader.expect(",}")) == "}"
        if name is None or arguments is None:
            raise Unreadable
        return name, arguments

    def _quoted(self, words: Collection[str]) -> Reading[str]:
        quote = yield from self._reader.expect("\"'")
        word = yield from self._reader.one_of(words, end=quote)
        self._reader.position += 1
        return word


def _is_json(text: str) -> bool:
    """Whether the text can be passed on as it is, its numbers as exact as they were written."""
    try:
        json.loads(text, parse_int=str, parse_float=str)
    except ValueError:
        return False
    return True


def _to_json(arguments: dict[str, Value]) -> str:
    try:
        return json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise Unreadable from error
