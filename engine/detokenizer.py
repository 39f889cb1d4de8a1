"""Tokens to text while they come: no half characters, no stop strings.

Pure: knows neither tokenizers nor requests.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Collection, Sequence


class StopStrings:
    """Lets text through up to the first stop string, however the text is cut into pieces.

    The stop string that is complete first wins (of two that end together, the longer one), as if the text came one
    character at a time. What may be the beginning of a stop string is held back until it is clear.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops)
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Take more text; returns what is certain by now. Nothing more comes after a match."""
        if self.matched is not None:
            return ""
        text = self._held + text
        ends = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if ends:
            _, start, self.matched = min(ends)
            self._held = ""
            return text[:start]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """No more text comes: returns what was held back."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, without being all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class TextStream:
    """The text of one answer, token by token.

    `token_bytes` gives a token's bytes; tokens in `skipped` give none. Before token number `min_tokens`, stop strings
    are not looked for. The pieces that `push` and `finish` return, joined, are the answer's text: the tokens' bytes
    read as UTF-8 (U+FFFD for what is none) up to the stop string.
    """

    def __init__(
        self,
        token_bytes: Callable[[int], bytes],
        skipped: Collection[int] = (),
        stops: Sequence[str] = (),
        min_tokens: int = 0,
    ) -> None:
        self._token_bytes = token_bytes
        self._skipped = skipped
        self._stops = StopStrings(stops)
        self._min_tokens = min_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._tokens = 0
        self.decoded = 0  # characters so far, with those held back

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the text, if one did."""
        return self._stops.matched

    def push(self, token_id: int) -> str:
        """Take one more token; returns the text that became certain."""
        self._tokens += 1
        raw = b"" if token_id in self._skipped else self._token_bytes(token_id)
        return self._take(self._utf8.decode(raw))

    def skip(self) -> None:
        """Take a token that shows no text (the one that stops the answer)."""
        self._tokens += 1

    def finish(self) -> str:
        """No more tokens come: returns the rest, with U+FFFD for an incomplete character."""
        return self._take(self._utf8.decode(b"", final=True)) + self._stops.flush()

    def _take(self, text: str) -> str:
        self.decoded += len(text)
        return text if self._tokens < self._min_tokens else self._stops.push(text)
