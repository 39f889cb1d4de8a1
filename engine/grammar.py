"""Structured output: a grammar says which tokens an answer may go on with, by llguidance.

A `Matcher` depends on the generated tokens alone: a preempted request keeps its own. Imports no torch, so that the
gateway can check grammars; `engine/bitmask.py` applies the masks.

Shape suffix: W 32-bit words of a mask, bit `i % 32` of word `i // 32` for token id `i`.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from engine.request import Grammar, RequestRejected
from engine.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

MAX_SOURCE = 128 * 1024  # characters; about two seconds to compile at the very worst
_MAX_MESSAGE = 300
_CACHED = 64
# White space in JSON could otherwise go on for ever, and small models let it.
_WHITESPACE = r"[ \n\r\t]{1,40}"
# So a mask of a hostile grammar takes some ten milliseconds at most; each of the lexer's states takes 1 to 2 kB.
_LIMITS = LLParserLimits(
    max_lexer_states=50_000,
    max_grammar_size=100_000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    verbose_errors=False,
)
_FIELDS = {
    "json_schema": "response_format",
    "json_object": "response_format",
    "regex": "regex",
    "choice": "choice",
    "lark": "grammar",
}


class GrammarError(RuntimeError):
    """A grammar that cannot be followed any further, mostly because it turned out too complex. The message says why."""


class Matcher(Protocol):
    """What one answer may go on with, given the tokens that it has so far."""

    def fill_mask(self, row_W: Tensor) -> None:
        """Write the mask of the tokens that may come next (int32, contiguous, on the CPU); at least one may.

        End-of-text ids are allowed where the answer may end. Raises GrammarError.
        """

    def accept(self, token_id: int) -> None:
        """Take the answer's next token, which the mask allowed. Raises GrammarError."""

    @property
    def is_done(self) -> bool:
        """Nothing but an end-of-text token may follow; true as well when one has come."""


def replay(matcher: Matcher, token_ids: Sequence[int]) -> None:
    """Brings a new answer's matcher to where another engine left it. Raises RequestRejected where it cannot follow."""
    try:
        for token_id in token_ids:
            matcher.accept(token_id)
    except GrammarError as error:
        raise RequestRejected(f"generated_token_ids do not follow the grammar: {error}") from error


class Grammars:
    """Compiles grammars for one vocabulary. Thread-safe.

    Tokens are the text tokens of the checkpoint's tokenizer: special tokens and ids beyond it (`vocab_size` may be
    padded) are never allowed, except `eos_token_ids` where the text may end.
    """

    def __init__(self, tokenizer_dir: str | Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """Cheap: the tokenizer is read when the first grammar comes. `eos_token_ids` empty: the tokenizer's own."""
        self._dir = Path(tokenizer_dir)
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._lock = threading.Lock()
        self._vocabulary: _Vocabulary | None = None
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()

    def compile(self, grammar: Grammar, field: str | None = None) -> Matcher:
        """A matcher for a new answer. Takes up to seconds for a large grammar that is not in the cache.

        Raises RequestRejected, naming `field` (by default the one that a grammar of this kind comes in), when the
        grammar is not valid or too large, or the model has no tokenizer.
        """
        field = field or _FIELDS[grammar.kind]
        vocabulary = self._load(field)
        with self._lock:
            compiled = self._compiled.get(grammar)
            if compiled is not None:
                self._compiled.move_to_end(grammar)
                return _GrammarMatcher(compiled.deep_copy(), vocabulary)
        compiled = _compile(grammar, vocabulary, field)
        with self._lock:
            self._compiled[grammar] = compiled
            while len(self._compiled) > _CACHED:
                self._compiled.popitem(last=False)
            return _GrammarMatcher(compiled.deep_copy(), vocabulary)

    def _load(self, field: str) -> _Vocabulary:
        with self._lock:
            if self._vocabulary is None:
                tokenizer = Tokenizer.from_dir(self._dir)
                if tokenizer is None:
                    raise RequestRejected(f"{field} cannot be used: this model has no tokenizer", field=field)
                self._vocabulary = _Vocabulary(tokenizer, self._vocab_size, self._eos_token_ids)
            return self._vocabulary


def validate(grammar: Grammar, field: str | None = None, subject: str | None = None) -> None:
    """Check a grammar without a vocabulary: what passes here mostly compiles. Takes up to a second.

    Raises RequestRejected as `Grammars.compile` does; the message begins with `subject`, by default the field's name.
    """
    field = field or _FIELDS[grammar.kind]
    subject = subject or field
    failed, problems = LLMatcher.validate_grammar_with_warnings(_translate(grammar, field, subject), limits=_LIMITS)
    if failed:
        raise _rejection(problems[0], field, subject)


class _Vocabulary:
    """A tokenizer as llguidance wants it, and the ids that may ever be generated under a grammar."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        eos = list(eos_token_ids or tokenizer.eos_token_ids)
        text = [i for i in range(min(tokenizer.vocab_size, vocab_size)) if tokenizer.is_text(i)]
        self.tokens = LLTokenizer(tokenizer.to_json(), n_vocab=vocab_size, eos_token=eos or None)
        bits = np.zeros((vocab_size + 31) // 32 * 32, dtype=np.uint8)
        bits[text] = 1
        bits[eos] = 1
        self.usable_W = np.packbits(bits, bitorder="little").view("<i4")


class _GrammarMatcher:
    def __init__(self, matcher: LLMatcher, vocabulary: _Vocabulary) -> None:
        self._matcher = matcher
        self._usable_W = vocabulary.usable_W

    def fill_mask(self, row_W: Tensor) -> None:
        assert row_W.is_contiguous() and row_W.shape == self._usable_W.shape
        mask_W = row_W.numpy()
        assert mask_W.dtype == np.int32
        self._matcher.unsafe_compute_mask_ptr(row_W.data_ptr(), mask_W.nbytes)
        if self._matcher.is_error():
            raise GrammarError(_sentence(self._matcher.get_error()))
        mask_W &= self._usable_W
        if not mask_W.any():
            raise GrammarError("no token of this model can continue the text")

    def accept(self, token_id: int) -> None:
        if not self._matcher.consume_token(token_id):
            raise GrammarError(_sentence(self._matcher.get_error()))

    @property
    def is_done(self) -> bool:
        return self._matcher.is_stopped()


def _compile(grammar: Grammar, vocabulary: _Vocabulary, field: str) -> LLMatcher:
    matcher = LLMatcher(vocabulary.tokens, _translate(grammar, field, field), limits=_LIMITS, log_level=0)
    if not matcher.is_error():
        # The first mask shows most of what is too complex, and grammars that begin with a special token.
        mask_W = np.empty_like(vocabulary.usable_W)
        matcher.unsafe_compute_mask_ptr(mask_W.ctypes.data, mask_W.nbytes)
        if not matcher.is_error() and not (mask_W & vocabulary.usable_W).any():
            raise _rejection("no token of this model can begin the text", field, field)
    if matcher.is_error():
        raise _rejection(matcher.get_error(), field, field)
    return matcher


def _translate(grammar: Grammar, field: str, subject: str) -> str:
    """The grammar in llguidance's own form."""
    if len(grammar.source) > MAX_SOURCE:
        raise _rejection(f"longer than {MAX_SOURCE} characters", field, subject)
    try:
        match grammar.kind:
            case "regex":
                return LLMatcher.grammar_from_regex(grammar.source)
            case "lark":
                return LLMatcher.grammar_from_lark(grammar.source)
            case "choice":
                return LLMatcher.grammar_from_regex(_choice(json.loads(grammar.source)))
            case "json_object":
                return _from_schema({"type": "object"})
            case "json_schema":
                return _from_schema(json.loads(grammar.source))
    except (ValueError, RecursionError) as error:
        raise _rejection(str(error), field, subject) from error


def _choice(choices: object) -> str:
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c for c in choices):
        raise ValueError("not a list of non-empty strings")
    return "|".join(re.sub(r"[^\w]", lambda character: f"\\x{{{ord(character[0]):x}}}", choice) for choice in choices)


def _from_schema(schema: object) -> str:
    if not isinstance(schema, dict | bool):
        raise ValueError("a schema must be an object or a boolean")
    text = json.dumps(schema if isinstance(schema, dict) else {"anyOf": [schema]})
    return LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": _WHITESPACE})


def _rejection(problem: str, field: str, subject: str) -> RequestRejected:
    return RequestRejected(f"{subject} cannot be used: {_sentence(problem)}", field=field)


def _sentence(problem: str) -> str:
    """llguidance's message on one line, without its traces."""
    text = " ".join(problem.replace("<non-verbose/>", "").split())
    return text if len(text) <= _MAX_MESSAGE else text[: _MAX_MESSAGE - 1] + "…"
