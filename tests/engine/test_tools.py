"""Tool calls: found in text of both forms, however it is cut."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.request import RequestRejected
from engine.tool_parser import ToolParser, parse
from engine.tools import CallArguments, CallStart, ContentDelta, Tool, ToolEvent

NAMES = ("get_weather", "f", "f2", "do-it.now")
START, END = "<|python_start|>", "<|python_end|>"


def make_id(index: int) -> str:
    return f"call_{index}"


def found(text: str) -> tuple[str, list[tuple[str, object]]]:
    """Content and (name, arguments) of a text."""
    content, calls = parse(text, NAMES, make_id)
    assert [call.id for call in calls] == [make_id(i) for i in range(len(calls))]
    return content, [(call.name, json.loads(call.arguments)) for call in calls]


def merged(events: Sequence[ToolEvent]) -> list[ToolEvent]:
    """The events with neighbouring pieces of content as one."""
    result: list[ToolEvent] = []
    for event in events:
        if isinstance(event, ContentDelta) and result and isinstance(result[-1], ContentDelta):
            event = ContentDelta(result.pop().text + event.text)  # type: ignore[union-attr]
        result.append(event)
    return result


@pytest.mark.parametrize(
    ("text", "name", "arguments"),
    [
        ('[get_weather(city="Paris", days=3)]', "get_weather", {"city": "Paris", "days": 3}),
        ("[f()]", "f", {}),
        ("  [ f ( a = 1 , ) , ]\n", "f", {"a": 1}),
        ("[f(a=-1.5, b=+2, c=1e3, d=.5, e=0x1F, f=1_000)]", "f", dict(a=-1.5, b=2, c=1e3, d=0.5, e=31, f=1000)),
        ("[f(a=True, b=None, c=false, d=null)]", "f", {"a": True, "b": None, "c": False, "d": None}),
        ("[f(a=[1, [2]], b=(1, 2), c=(3), d=())]", "f", {"a": [1, [2]], "b": [1, 2], "c": 3, "d": []}),
        ("[f(a={'k': [None], \"\": {}})]", "f", {"a": {"k": [None], "": {}}}),
        (r"""[f(a='it\'s', b="x]\")", c='\n\x41é\\ \d')]""", "f", {"a": "it's", "b": 'x]")', "c": "\nAé\\ \\d"}),
        ('[f(a="""two\nlines "quoted" """)]', "f", {"a": 'two\nlines "quoted" '}),
        ("[f(a='', b='[f(a=1)]')]", "f", {"a": "", "b": "[f(a=1)]"}),
        ('[f(a="3")]', "f", {"a": "3"}),
        ("[do-it.now(a-b=1)]", "do-it.now", {"a-b": 1}),
        (f"{START}[f2(a=1)]{END}", "f2", {"a": 1}),
        (f"{START}\n[f2(a=1)]", "f2", {"a": 1}),
        ('{"name": "f", "parameters": {"a": [1, {"b": null}]}}', "f", {"a": [1, {"b": None}]}),
        ('{"type":"function","name":"f","arguments":{}}', "f", {}),
        ('{\n  "parameters": {"a": true},\n  "name": "f"\n}\n', "f", {"a": True}),
        ('[{"name": "f", "parameters": {}}]', "f", {}),
        (r'{"name": "f", "parameters": {"a": "\ud83d\ude00 \/ \u00e9 {\"name\""}}', "f", {"a": '😀 / é {"name"'}),
        ("{'name': 'f', 'parameters': {'a': True, 'b': None,}}", "f", {"a": True, "b": None}),
        ('{"name": "f", "parameters": {"a": "two\nlines"}}', "f", {"a": "two\nlines"}),
        (f'{START}{{"name": "f", "parameters": {{}}}}{END}', "f", {}),
    ],
)  # fmt: skip
def test_a_call_alone(text: str, name: str, arguments: object) -> None:
    assert found(text) == ("", [(name, arguments)])


@pytest.mark.parametrize(
    ("text", "content", "names"),
    [
        ("Let me see. [f(a=1)] There.", "Let me see.  There.", ["f"]),
        ("[f(a=1), f2(b=2)]", "", ["f", "f2"]),
        ('{"name": "f", "parameters": {}}; {"name": "f2", "parameters": {}}', "", ["f", "f2"]),
        ('{"name": "f", "parameters": {}}\n{"name": "f2", "parameters": {}}\n', "", ["f", "f2"]),
        ('[{"name": "f", "parameters": {}}, {"name": "f2", "arguments": {}}]', "", ["f", "f2"]),
        (f"{START}[f()]{END}{START}[f2()]{END}", "", ["f", "f2"]),
        (f"I call {START}[f()]{END} and\n[f2()]", "I call  and\n", ["f", "f2"]),
        ('```json\n{"name": "f", "parameters": {}}\n```', "```json\n\n```", ["f"]),
        ("see [1], [f] and {x: [f2(a=1)]", "see [1], [f] and {x: ", ["f2"]),
        # What is good of a list counts.
        ("[f(a=1), other(b=2)]", ", other(b=2)]", ["f"]),
        ("[f(a=1), f2(b=", ", f2(b=", ["f"]),
    ],
)
def test_calls_among_text(text: str, content: str, names: list[str]) -> None:
    found_content, calls = found(text)
    assert (found_content, [name for name, _ in calls]) == (content, names)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n",
        "[other(a=1)]",
        '{"name": "other", "parameters": {}}',
        "[f(1)]",
        "[f(x)]",
        "[f(a=x)]",
        "[f(a=1, a=2)]",
        "[f(**{'a': 1})]",
        "[f(x) for x in y]",
        "[f(a=f'{x}')]",
        "[f(a=__import__('os'))]",
        "[f(a=1+1)]",
        "[f(a=012)]",
        "[f(a=1e999)]",
        "[f(a={1: 2})]",
        "[f(a='two\nlines')]",
        r"[f(a='\ud800')]",
        "[f(a=1)",
        "[f(a='",
        "[f.g(a=1)]",
        "f(a=1)",
        "[]",
        "{}",
        "[[f(a=1]",
        '{"name": "f"}',
        '{"name": "f", "parameters": null}',
        '{"name": "f", "parameters": {}, "arguments": {}}',
        '{"name": "f", "name": "f", "parameters": {}}',
        '{"name": "f", "parameters": {}, "more": 1}',
        '{"name": "f", "parameters": {"a": NaN}}',
        '{"name": "f", "parameters": {"a": 1}',
        '{"type": "object", "name": "f", "parameters": {}}',
        f"{START}print(1){END}",
        f"a < b, {START}",
        "[f(a=" + "[" * 100 + "]" * 100 + ")]",
    ],
)
def test_other_text_comes_back_unchanged(text: str) -> None:
    assert parse(text, NAMES, make_id) == (text, ())


def test_numbers_of_json_stay_as_they_were_written() -> None:
    arguments = '{"a": 1.10, "b": 1e999, "c": ' + "9" * 5000 + "}"
    _, (call,) = parse(f'{{"name": "f", "parameters": {arguments}}}', NAMES, make_id)
    assert call.arguments == arguments


@pytest.mark.parametrize(
    "text",
    [
        "see [1], {x}; a < b <| c",
        "[get_weathers(",
        '{"name": "Bob"',
        '{"id": 1',
        "[f(a=1 b",
        "[f(x y",
        "[f(a=xy ",
        '[{"name": "f3',
        "[f(a='x'y",
        f"{START}print(",
    ],
)
def test_text_that_cannot_become_a_call_is_not_held_back(text: str) -> None:
    parser = ToolParser(NAMES, make_id)
    assert merged([event for character in text for event in parser.push(character)]) == [ContentDelta(text)]


@pytest.mark.parametrize("text", ["[f(a='x, y')]", '{"name": "f", "parameters": {"a": "x, y"}}'])
def test_a_call_comes_at_once_when_it_is_complete(text: str) -> None:
    parser = ToolParser(NAMES, make_id)
    assert [event for character in text[:-1] for event in parser.push(character)] == []
    start, arguments = parser.push(text[-1])
    assert start == CallStart(0, "call_0", "f")
    assert isinstance(arguments, CallArguments) and json.loads(arguments.text) == {"a": "x, y"}
    assert parser.finish() == []


@pytest.mark.parametrize(
    "piece", ["[f(a='", "[f(a=[", '{"name":"f","parameters":{"a":', '[f(a="""', "[", '[f(a="\\', "<|python_"]
)
def test_hostile_text_takes_linear_time(piece: str) -> None:
    text = piece * (20_000 // len(piece))
    started = time.process_time()
    assert parse(text, NAMES, make_id) == (text, ())
    assert time.process_time() - started < 3.0


# Text without anything that could begin a call, arguments, and calls in every form.
unicode = st.characters(codec="utf-8")
plain = st.text(st.characters(codec="utf-8", exclude_characters="[{<"), max_size=20)
names = st.sampled_from(NAMES)
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(unicode)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(unicode), inner, max_size=3),
    max_leaves=6,
)
python_arguments = st.dictionaries(st.from_regex(r"[a-z_][a-z0-9_-]{0,8}", fullmatch=True), values, max_size=3)
json_arguments = st.dictionaries(st.text(unicode), values, max_size=3)

Call = tuple[str, dict[str, object]]


@st.composite
def written_calls(draw: st.DrawFn) -> tuple[str, list[Call]]:
    """Calls as a model writes them."""
    tags = draw(st.sampled_from(["{}", START + "{}" + END, START + "{}"]))
    form = draw(st.sampled_from(["python", "json", "json list"]))
    arguments = python_arguments if form == "python" else json_arguments
    calls = draw(st.lists(st.tuples(names, arguments), min_size=1, max_size=3))
    if form == "python":
        space = draw(st.sampled_from(["", " ", "\n"]))
        written = [f"{n}({(',' + space).join(f'{k}{space}={space}{v!r}' for k, v in a.items())})" for n, a in calls]
        return tags.format(f"[{(space + ',').join(written)}{space}]"), calls
    key = draw(st.sampled_from(["parameters", "arguments"]))
    ascii_only, indent = draw(st.booleans()), draw(st.sampled_from([None, 2]))
    objects = [json.dumps({"name": n, key: a}, ensure_ascii=ascii_only, indent=indent) for n, a in calls]
    if form == "json":
        return tags.format(draw(st.sampled_from([";", "\n", "; ", ""])).join(objects)), calls
    return tags.format("[" + ", ".join(objects) + "]"), calls


def events_of(text: str, cuts: Sequence[int]) -> list[ToolEvent]:
    parser = ToolParser(NAMES, make_id)
    bounds = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(bounds)]
    return merged([*(event for piece in pieces for event in parser.push(piece)), *parser.finish()])


@given(plain, written_calls(), plain)
def test_calls_that_were_written_are_found(before: str, written: tuple[str, list[Call]], after: str) -> None:
    text, calls = written
    content, parsed = found(before + text + after)
    assert parsed == calls
    assert content == (before if before.strip(" \t\r\n") else "") + (after if after.strip(" \t\r\n;,") else "")


fragments = st.sampled_from(
    [
        *"[](){}<>|=,;:'\"\\ \n1-.f",
        *("f2", "get_weather", "[f(", "[f(a=1)]", "a=", "True", "None", '"""', r"\u", "d800", "other(", "é"),
        *('{"name": "f"', '"name"', '"parameters"', ': {"a": "b"}', '{"name": "f2", "arguments": {}}'),
        *(START, END, "<|py"),
    ]
)  # fmt: skip
soup = st.lists(fragments | st.text(st.characters(codec="utf-8"), max_size=3), max_size=25).map("".join)
cuts = st.lists(st.integers(0, 10_000), max_size=30)


@given(soup | st.tuples(soup, written_calls(), soup).map(lambda t: t[0] + t[1][0] + t[2]), cuts)
def test_however_the_text_is_cut_the_events_are_the_same(text: str, cuts: list[int]) -> None:
    assert events_of(text, cuts) == events_of(text, []) == events_of(text, range(len(text)))


@given(soup)
def test_any_text_is_either_content_or_calls(text: str) -> None:
    content, calls = parse(text, NAMES, make_id)
    for call in calls:
        assert call.name in NAMES and isinstance(json.loads(call.arguments), dict)
    assert calls or content == text
    assert parse(text, (), make_id) == (text, ())


def test_a_tool_must_be_usable() -> None:
    for bad in ("", "a b", "x" * 65, "é"):
        with pytest.raises(RequestRejected, match="function name") as caught:
            Tool(bad)
        assert caught.value.field == "tools"
    with pytest.raises(RequestRejected, match="must be of type object"):
        Tool("f", parameters={"type": "string"})
