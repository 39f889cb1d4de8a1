"""Tokenizer and incremental text."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from engine.detokenizer import StopStrings, TextStream
from engine.request import RequestRejected
from engine.tokenizer import Tokenizer

STOPS = st.lists(st.text("ab<|é", min_size=1, max_size=4), max_size=3)


def cut(text: str, stops: list[str], first_end: int = 0) -> str:
    """What StopStrings should let through, one character at a time."""
    for end in range(first_end, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))]
    return text


@given(st.text("ab<|éx", max_size=30), STOPS, st.lists(st.integers(0, 30), max_size=6))
def test_stop_strings_do_not_depend_on_the_pieces(text: str, stops: list[str], cuts: list[int]) -> None:
    borders = sorted({0, len(text), *(min(c, len(text)) for c in cuts)})
    stop = StopStrings(stops)
    out = [stop.push(text[a:b]) for a, b in pairwise(borders)]
    out.append(stop.flush())
    assert "".join(out) == cut(text, stops)
    assert (stop.matched is not None) == any(s in text for s in stops)
    assert not any(s in "".join(out) for s in stops)


def test_held_back_text_is_no_more_than_what_may_be_a_stop() -> None:
    stop = StopStrings(["\n\nUser:"])
    assert stop.push("Hi.\n") == "Hi."
    assert stop.push("\n\nUse") == "\n"
    assert stop.push(" it") == "\n\nUse it"


@given(st.lists(st.binary(min_size=1, max_size=3), max_size=20), STOPS, st.integers(0, 4))
def test_text_stream_over_any_bytes(tokens: list[bytes], stops: list[str], min_tokens: int) -> None:
    stream = TextStream(lambda i: tokens[i], stops=stops, min_tokens=min_tokens)
    out = []
    for token_id in range(len(tokens)):
        out.append(stream.push(token_id))
        if stream.stopped:
            break
    out.append(stream.finish())
    text = "".join(out)
    if min_tokens == 0:
        assert text == cut(b"".join(tokens).decode(errors="replace"), stops)
    assert stream.stopped is None or stream.stopped in stops


@given(st.text(max_size=20), st.data())
def test_any_split_into_tokens_gives_the_same_text(text: str, data: st.DataObject) -> None:
    raw = text.encode()
    cuts = data.draw(st.lists(st.integers(0, len(raw)), max_size=10))
    tokens = [raw[a:b] for a, b in pairwise(sorted({0, len(raw), *cuts}))]
    stream = TextStream(lambda i: tokens[i])
    pieces = [stream.push(i) for i in range(len(tokens))]
    assert "".join(pieces) == text  # complete without finish, and so never a half character before
    assert stream.finish() == ""


def test_incomplete_characters_are_held_and_flushed() -> None:
    stream = TextStream(lambda i: bytes([i]))
    assert [stream.push(b) for b in "€".encode()] == ["", "", "€"]
    assert stream.push(0xE2) == ""
    assert stream.finish() == "\ufffd"


@given(text=st.text(max_size=30))
def test_tokenizer_round_trip(text: str, tokenizer: Tokenizer) -> None:
    assume("<|" not in text)  # the name of a special token is that token
    ids = tokenizer.encode(text)
    assert ids[0] in tokenizer.special_ids
    assert tokenizer.decode(ids) == text


@given(ids=st.lists(st.integers(0, 263), max_size=20), skip=st.booleans())
def test_decode_equals_the_library(ids: list[int], skip: bool, tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(ids, skip) == tokenizer._backend.decode(ids, skip_special_tokens=skip)


def test_tokens_shown_by_themselves(tokenizer: Tokenizer) -> None:
    euro = tokenizer.encode("€", add_special_tokens=False)
    assert [tokenizer.token_text(i) for i in euro] == ["bytes:\\xe2", "bytes:\\x82", "bytes:\\xac"]
    assert tokenizer.token_text(tokenizer.eos_token_ids[0]) == "<|eot|>"
    assert tokenizer.token_text(299) == ""


def test_chat_template(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_chat([{"role": "user", "content": "Hi"}])
    expected = "<|begin_of_text|><|header_start|>user<|header_end|>Hi<|eot|><|header_start|>assistant<|header_end|>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == expected


def test_directories_without_and_with_a_broken_tokenizer(tmp_path: Path, checkpoint: Path) -> None:
    assert Tokenizer.from_dir(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: cannot be read"):
        Tokenizer.from_dir(tmp_path)
    other = json.loads((checkpoint / "tokenizer.json").read_text()) | {"decoder": {"type": "Fuse"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="not ByteLevel"):
        Tokenizer.from_dir(tmp_path)


def test_no_chat_template(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((checkpoint / "tokenizer.json").read_bytes())
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert tokenizer is not None
    with pytest.raises(RequestRejected, match="no chat template") as caught:
        tokenizer.encode_chat([{"role": "user", "content": "Hi"}])
    assert caught.value.field == "messages"
