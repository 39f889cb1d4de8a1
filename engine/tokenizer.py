"""Text to token ids and back, as the checkpoint's own tokenizer files say."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Self

from jinja2.exceptions import TemplateError

from engine.request import RequestRejected

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def _byte_of_symbol() -> dict[str, int]:
    """The byte that each symbol of a byte-level vocabulary stands for.

    Printable Latin-1 stands for itself; the other bytes, in order, are written from U+0100 on (GPT-2's alphabet).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    table = {chr(byte): byte for byte in printable}
    table.update((chr(0x100 + i), byte) for i, byte in enumerate(b for b in range(256) if b not in printable))
    return table


_BYTE_OF_SYMBOL = _byte_of_symbol()
_WORD_JOINER = "\u2060"  # cuts the name of a special token, so that it is none


def _for_template(message: Mapping[str, object]) -> dict[str, object]:
    """A message as chat templates want it: the arguments of its calls as objects, no content as empty text.

    Raises RequestRejected (field "messages") for arguments that are no JSON object.
    """
    shown = {**message, "content": "" if message.get("content") is None else message["content"]}
    calls = message.get("tool_calls")
    if isinstance(calls, list | tuple):
        shown["tool_calls"] = [{**call, "function": _with_arguments(call["function"])} for call in calls]
    return shown


def _with_arguments(function: Mapping[str, object]) -> dict[str, object]:
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, Mapping):
        raise RequestRejected(
            f"messages: the arguments of the call to {function.get('name')!r} are no JSON object", field="messages"
        )
    return {**function, "arguments": arguments}


class Tokenizer:
    """A byte-level BPE tokenizer with special tokens and, mostly, a chat template: the kind that Llama 4 has.

    Decoding is exact: the bytes of the tokens, joined, read as UTF-8. No spaces are cleaned up.
    """

    def __init__(self, fast: PreTrainedTokenizerFast) -> None:
        """Raises ValueError when `fast` is not byte-level."""
        self._fast = fast
        self._backend = fast.backend_tokenizer
        if "ByteLevel" not in repr(self._backend.decoder):
            raise ValueError("tokenizer.json: its decoder is not ByteLevel; only byte-level BPE can be served")
        self._bytes: dict[int, bytes] = {}
        added = self._backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.eos_token_ids: tuple[int, ...] = () if fast.eos_token_id is None else (fast.eos_token_id,)
        self.vocab_size = self._backend.get_vocab_size(with_added_tokens=True)
        self.has_chat_template = fast.chat_template is not None

    @classmethod
    def from_dir(cls, path: str | Path) -> Self | None:
        """The tokenizer of a checkpoint directory; None when it has no tokenizer.json.

        Raises ValueError when the file is there but cannot be used.
        """
        file = Path(path) / "tokenizer.json"
        if not file.is_file():
            return None
        # It takes a second, which processes that only may need a tokenizer should not pay.
        from transformers import PreTrainedTokenizerFast

        try:
            fast = PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True)
        except Exception as error:  # the Rust side raises bare Exception for a broken file
            raise ValueError(f"{file}: cannot be read as a tokenizer: {error}") from error
        return cls(fast)

    def to_json(self) -> str:
        """The contents of a tokenizer.json with all added tokens, without padding and truncation."""
        backend = copy(self._backend)
        backend.no_padding()
        backend.no_truncation()
        text: str = backend.to_str()
        return text

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, by default with what the tokenizer puts around a prompt (begin-of-text)."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_chat(
        self, messages: Sequence[Mapping[str, object]], tools: Sequence[Mapping[str, object]] = ()
    ) -> list[int]:
        """Token ids of a conversation up to where the assistant's answer begins.

        `messages` have OpenAI's form: `role` and `content`; an assistant's calls as `tool_calls` of
        `{"id": ..., "type": "function", "function": {"name": ..., "arguments": JSON text}}`; a call's result as role
        "tool" with `tool_call_id` and `content`. `tools`: definitions in OpenAI's form (`Tool.definition()`).
        Raises RequestRejected (field "messages") when there is no chat template or the template refuses them.
        """
        return self.encode(self._render(messages, tools, {}), add_special_tokens=False)

    def encode_chat_between(
        self,
        messages: Sequence[Mapping[str, object]],
        tools: Sequence[Mapping[str, object]],
        gap: int,
        reserved: Collection[int],
    ) -> list[list[int]]:
        """As encode_chat, cut where the chat template writes the special token `gap`: the place of an image.

        A message's content may be a list of parts: `{"type": "text", "text": ...}` and, for an image,
        `{"type": "image"}`. Where messages or tools spell a special token of `reserved`, `gap` among them, the model
        sees the letters and not the token, so nobody's words are taken for an image's place.
        """
        names = [self.token_text(token_id) for token_id in reserved]
        stand_ins = {name: name[:1] + _WORD_JOINER + name[1:] for name in names}
        rendered = self._render(messages, tools, stand_ins)
        within_names = "|".join(f"(?<={re.escape(n[:1])}){_WORD_JOINER}(?={re.escape(n[1:])})" for n in names)
        return [
            [token_id for part in re.split(within_names, piece) for token_id in self.encode(part, False)]
            for piece in rendered.split(self.token_text(gap))
        ]

    def _render(
        self,
        messages: Sequence[Mapping[str, object]],
        tools: Sequence[Mapping[str, object]],
        stand_ins: Mapping[str, str],
    ) -> str:
        """What the chat template writes, given `stand_ins` for names that messages and tools spell."""
        if not self.has_chat_template:
            raise RequestRejected("messages: this model has no chat template; send a prompt instead", field="messages")
        try:
            found = [[_for_template(message) for message in messages], [dict(tool) for tool in tools]]
            shown = json.dumps(found, ensure_ascii=False)
            for name, stand_in in stand_ins.items():
                shown = shown.replace(name, stand_in)
            conversation, definitions = json.loads(shown)
            text = self._fast.apply_chat_template(
                conversation, tools=definitions or None, add_generation_prompt=True, tokenize=False
            )
            assert isinstance(text, str)
            text.encode()  # arguments may hold half of a surrogate pair as an escape
        except RequestRejected:
            raise
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:
            raise RequestRejected(f"messages: the chat template refuses them: {error}", field="messages") from error
        return text

    def is_text(self, token_id: int) -> bool:
        """Whether the id is in the vocabulary and no special token."""
        return token_id not in self.special_ids and self._backend.id_to_token(token_id) is not None

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; none for an id that the vocabulary leaves out."""
        found = self._bytes.get(token_id)
        if found is None:
            symbols = self._backend.id_to_token(token_id) or ""
            if all(symbol in _BYTE_OF_SYMBOL for symbol in symbols):
                found = bytes(_BYTE_OF_SYMBOL[symbol] for symbol in symbols)
            else:
                found = symbols.encode()
            self._bytes[token_id] = found
        return found

    def token_text(self, token_id: int) -> str:
        """A token by itself, to show: its text, or `bytes:\\xe2\\x80` when it is only a part of a character."""
        raw = self.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`; bytes that are no UTF-8 become U+FFFD."""
        skipped = self.special_ids if skip_special_tokens else ()
        return b"".join(self.token_bytes(i) for i in token_ids if i not in skipped).decode(errors="replace")
