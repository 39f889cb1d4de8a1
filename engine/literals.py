"""Reads JSON and Python literals from text that is still being written.

The readers are generators: they yield when they need more text than there is, and return what they read. They raise
`Unreadable` at the first character that cannot go on. Nothing is ever evaluated.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Collection, Generator
from typing import TypeAlias, TypeVar

Value: TypeAlias = "str | int | float | bool | list[Value] | dict[str, Value] | None"
_Result = TypeVar("_Result")
Reading: TypeAlias = Generator[None, None, _Result]

MAX_DEPTH = 64
MAX_DIGITS = 4000  # Python converts no more than 4,300

_SPACE = re.compile(r"[ \t\r\n]*")
_WORD = re.compile(r"[\w.+-]*")
_NUMBER = re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?")
_INTEGER = re.compile(r"[-+]?(?:0[xX][0-9a-fA-F_]+|0[oO][0-7_]+|0[bB][01_]+|[0-9][0-9_]*)")
_CONSTANTS: dict[str, Value] = {
    "true": True,
    "True": True,
    "false": False,
    "False": False,
    "null": None,
    "None": None,
}
_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|N\{[^{}]+\}|[0-7]{1,3}|.)", re.DOTALL)
_ESCAPED = {
    "\n": "",
    "\\": "\\",
    "'": "'",
    '"': '"',
    "a": "\a",
    "b": "\b",
    "f": "\f",
    "n": "\n",
    "r": "\r",
    "t": "\t",
    "v": "\v",
}


class Unreadable(Exception):
    """The text is not what was looked for."""


class Reader:
    """Text that grows at its end. `position` is the next character to read; text before `kept` is no longer needed."""

    def __init__(self) -> None:
        self.text = ""
        self.position = 0
        self.kept = 0
        self._ended = False

    def feed(self, text: str) -> None:
        self.text += text

    def end(self) -> None:
        """No more text comes."""
        self._ended = True

    def trim(self) -> None:
        """Forget the text before `kept` once it is most of the text. Positions that others remember become wrong."""
        if 2 * self.kept <= len(self.text):
            return
        self.text = self.text[self.kept :]
        self.position -= self.kept
        self.kept = 0

    def peek(self) -> Reading[str]:
        """The next character, without reading it; nothing at the end of the text."""
        while self.position == len(self.text):
            if self._ended:
                return ""
            yield
        return self.text[self.position]

    def begins_with(self, word: str) -> Reading[bool]:
        """Whether `word` comes next, and if so reads it."""
        while True:
            rest = self.text[self.position : self.position + len(word)]
            if rest == word:
                self.position += len(word)
                return True
            if self._ended or not word.startswith(rest):
                return False
            yield

    def run(self, pattern: re.Pattern[str]) -> Reading[str]:
        """The longest run of the characters that `pattern` (`[...]*`) repeats; it may be empty."""
        start = self.position
        while True:
            match = pattern.match(self.text, self.position)
            assert match is not None
            self.position = match.end()
            if self.position < len(self.text) or self._ended:
                return self.text[start : self.position]
            yield

    def space(self) -> Reading[str]:
        """White space, if there is some; returns the character after it, without reading that."""
        yield from self.run(_SPACE)
        return (yield from self.peek())

    def expect(self, characters: str) -> Reading[str]:
        """White space and then one of `characters`, which is returned."""
        found = yield from self.space()
        if not found or found not in characters:
            raise Unreadable
        self.position += 1
        return found

    def one_of(self, words: Collection[str], end: str) -> Reading[str]:
        """One of `words`, up to a character of `end`, which is not read. Fails as soon as none can come any more."""
        start = self.position
        while True:
            following = yield from self.peek()
            word = self.text[start : self.position]
            if following and following in end and word in words:
                return word
            if not following or not any(known.startswith(word + following) for known in words):
                raise Unreadable
            self.position += 1

    def value(self, python: bool, depth: int = 0) -> Reading[Value]:
        """A literal of Python (`python`), or of JSON and then of whatever Python's form adds to it."""
        if depth > MAX_DEPTH:
            raise Unreadable
        opening = yield from self.space()
        if opening and opening in "\"'":
            return (yield from self.string(python))
        if opening == "{":
            return (yield from self._mapping(python, depth))
        if opening and opening in "[(":
            return (yield from self._sequence(python, depth))
        return _scalar((yield from self.run(_WORD)))

    def string(self, python: bool) -> Reading[str]:
        """A quoted string. Only in JSON's form may it hold line ends as they are, and only in Python's three quotes."""
        quote = yield from self.expect("\"'")
        if (yield from self.peek()) == quote:
            self.position += 1
            if not python or (yield from self.peek()) != quote:
                return ""
            self.position += 1
            quote *= 3
        plain = re.compile(r"[^\\" + quote[0] + ("\n]*" if python and len(quote) == 1 else "]*"))
        start = self.position
        while True:
            yield from self.run(plain)
            following = yield from self.peek()
            if following == "\\":
                self.position += 1
                if not (yield from self.peek()):
                    raise Unreadable
                self.position += 1
            elif following != quote[0]:
                raise Unreadable
            elif (yield from self.begins_with(quote)):
                return _unescape(self.text[start : self.position - len(quote)], python)
            else:
                self.position += 1

    def _mapping(self, python: bool, depth: int) -> Reading[dict[str, Value]]:
        yield from self.expect("{")
        found: dict[str, Value] = {}
        while (yield from self.space()) != "}":
            key = yield from self.string(python)
            yield from self.expect(":")
            found[key] = yield from self.value(python, depth + 1)
            if (yield from self.expect(",}")) == "}":
                return found
        self.position += 1
        return found

    def _sequence(self, python: bool, depth: int) -> Reading[Value]:
        opening = yield from self.expect("[(")
        closing = "]" if opening == "[" else ")"
        found: list[Value] = []
        while (yield from self.space()) != closing:
            found.append((yield from self.value(python, depth + 1)))
            if (yield from self.expect("," + closing)) == closing:
                return found if opening == "[" or len(found) > 1 else found[0]
        self.position += 1
        return found


def _scalar(word: str) -> Value:
    """A constant or a number; infinity for one that is beyond Python's."""
    if word in _CONSTANTS:
        return _CONSTANTS[word]
    try:
        if _INTEGER.fullmatch(word):
            return int(word, 0) if len(word) <= MAX_DIGITS else math.inf
        if _NUMBER.fullmatch(word):
            return float(word)
    except ValueError:  # 012 or 1__0
        pass
    raise Unreadable


def _unescape(text: str, python: bool) -> str:
    """The string that a literal means. Raises Unreadable when it is no Unicode text."""

    def replace(match: re.Match[str]) -> str:
        escape = match[1]
        if escape in _ESCAPED:
            return _ESCAPED[escape]
        if escape == "/" and not python:
            return "/"
        if escape[0] in "xuU" and len(escape) > 1:
            return chr(int(escape[1:], 16))
        if escape[0] in "01234567":
            return chr(int(escape, 8))
        if escape[0] == "N" and len(escape) > 1:
            return unicodedata.lookup(escape[2:-1])
        return match[0]

    try:
        if "\\" in text:
            text = _ESCAPE.sub(replace, text)
        if _SURROGATE.search(text):  # JSON writes characters beyond U+FFFF as two
            text = text.encode("utf-16", "surrogatepass").decode("utf-16")
    except (LookupError, ValueError, OverflowError) as error:
        raise Unreadable from error
    return text
