"""Grammars: which tokens their masks let through, and what of them is refused."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from checkpoints.tiny_tokenizer import build_tokenizer, byte_alphabet
from engine.bitmask import allocate_masks, apply_masks
from engine.grammar import MAX_SOURCE, GrammarError, Grammars, Matcher, replay, validate
from engine.request import Grammar, RequestRejected
from engine.tool_parser import parse
from engine.tools import Tool, tool_grammar

# The tokenizer has 280 tokens: bytes, five words (256 to 260) and special tokens.
VOCAB_SIZE = 331
END_OF_TEXT, EOM, EOT, BOS = 262, 268, 269, 261
EOS = {END_OF_TEXT, EOM, EOT}


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    fast = build_tokenizer(4096)
    assert fast.convert_tokens_to_ids(["<|end_of_text|>", "<|eom|>", "<|eot|>"]) == [END_OF_TEXT, EOM, EOT]
    fast.save_pretrained(str(path))
    return path


@pytest.fixture(scope="module")
def grammars(tokenizer_dir: Path) -> Grammars:
    return Grammars(tokenizer_dir, VOCAB_SIZE, sorted(EOS))


def allowed(matcher: Matcher, vocab_size: int = VOCAB_SIZE) -> set[int]:
    masks = allocate_masks(1, vocab_size)
    matcher.fill_mask(masks[0])
    kept = apply_masks(torch.zeros(1, vocab_size), masks)
    return set(torch.isfinite(kept[0]).nonzero().flatten().tolist())


def accepts(grammars: Grammars, grammar: Grammar, text: str) -> bool:
    """Whether the text, byte by byte, gets through the masks and may end there."""
    matcher = grammars.compile(grammar)
    for byte in text.encode():
        if byte not in allowed(matcher):
            return False
        matcher.accept(byte)
    return allowed(matcher) & EOS == EOS


PERSON = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)


@pytest.mark.parametrize(
    ("kind", "source", "good", "bad"),
    [
        ("json_schema", PERSON, ['{"name":"Bo","age":3}', '{ "name": "",\n "age": 0 }'], ['{"name":"Bo"}', "[]"]),
        ("json_schema", PERSON, ['{"name":"abcde","age":3}'], ['{"name":"abcdef","age":3}', '{"name":"a","age":-1}']),
        ("json_schema", "true", ["1", '"x"', "[null]"], ["x", ""]),
        ("json_schema", '{"enum": ["a", 1]}', ['"a"', "1"], ["a", "2"]),
        ("json_object", "", ["{}", '{"a": [1, {"b": null}]}'], ["[]", "1", "{", " {}", '{"a":}']),
        ("json_object", "", ["{" + " " * 40 + '"a":1}'], ["{" + " " * 41 + '"a":1}']),
        ("regex", "[ab]+(/é)?", ["a", "ab/é"], ["", "c", "a/", "a/é/"]),
        ("choice", '["yes", "no", "now", "a|b"]', ["yes", "no", "now", "a|b"], ["y", "yesno", "a", ""]),
        ("choice", '["é\\n\\u0000\\u007f\\u2028<"]', ["é\n\0\x7f\u2028<"], ["é"]),
        ("lark", 'start: "(" start ")" | "x"', ["x", "((x))"], ["(x", "()", "x)"]),
        ("lark", "start: /[a-z]+/ \"=\" value\nvalue: %json {\"type\": \"integer\"}", ["ab=12"], ["ab=x"]),
    ],
)  # fmt: skip
def test_masks_let_through_what_the_grammar_says(
    grammars: Grammars, kind: str, source: str, good: list[str], bad: list[str]
) -> None:
    grammar = Grammar(kind, source)  # type: ignore[arg-type]
    validate(grammar)
    assert [text for text in good if not accepts(grammars, grammar, text)] == []
    assert [text for text in bad if accepts(grammars, grammar, text)] == []


def test_special_tokens_and_padding_are_never_allowed(grammars: Grammars) -> None:
    matcher = grammars.compile(Grammar("regex", "(?s:.*)"))
    first = allowed(matcher)
    assert first >= set(range(128)) and 0x80 not in first  # no character begins with 0x80
    assert {256, 257, 258, 259, 260} | EOS <= first
    assert max(first - EOS) == 260
    # A grammar of the user's that asks for them.
    with pytest.raises(RequestRejected, match="no token of this model"):
        grammars.compile(Grammar("lark", f"start: <[{BOS}]>"))
    matcher = grammars.compile(Grammar("lark", 'start: "a" <|begin_of_text|>'))
    matcher.accept(ord("a"))
    with pytest.raises(GrammarError, match="no token of this model"):
        allowed(matcher)


def test_a_grammar_is_done_when_nothing_but_the_end_can_follow(grammars: Grammars) -> None:
    matcher = grammars.compile(Grammar("regex", "ab*c?"))
    assert not matcher.is_done
    for character in "abb":
        matcher.accept(ord(character))
        assert not matcher.is_done and allowed(matcher) == {ord("b"), ord("c")} | EOS
    matcher.accept(ord("c"))
    assert matcher.is_done and allowed(matcher) == EOS
    matcher.accept(EOT)
    assert matcher.is_done

    ended = grammars.compile(Grammar("regex", "ab*"))
    ended.accept(ord("a"))
    ended.accept(EOM)
    assert ended.is_done


def test_a_token_that_the_mask_forbids_is_an_error(grammars: Grammars) -> None:
    for token in (ord("b"), EOT, BOS, 300):
        with pytest.raises(GrammarError):
            grammars.compile(Grammar("regex", "ac")).accept(token)


def test_tokens_of_several_characters(tmp_path: Path) -> None:
    vocab = {symbol: i for i, symbol in enumerate([*byte_alphabet(), "ab", "abc", 'Ġ"', '":'])}
    merges = [("a", "b"), ("ab", "c"), ("Ġ", '"'), ('"', ":")]
    backend = Backend(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<end>", special=True, normalized=False)])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(str(tmp_path))
    ab, abc, space_quote, quote_colon, end = 256, 257, 258, 259, 260
    grammars = Grammars(tmp_path, 261, ())  # the tokenizer's own end

    matcher = grammars.compile(Grammar("regex", "ab(cd)?"))
    assert allowed(matcher, 261) == {ord("a"), ab, abc}
    matcher.accept(ab)
    assert allowed(matcher, 261) == {ord("c"), end}

    matcher = grammars.compile(Grammar("json_object", ""))
    matcher.accept(ord("{"))
    assert {ord('"'), ord(" "), ord("}"), space_quote} <= allowed(matcher, 261)
    matcher.accept(space_quote)
    assert {quote_colon, abc} <= allowed(matcher, 261)


def test_matchers_of_one_grammar_do_not_know_each_other(grammars: Grammars) -> None:
    grammar = Grammar("regex", "[ab]c")
    one, other = grammars.compile(grammar), grammars.compile(grammar)
    one.accept(ord("a"))
    assert (allowed(one), allowed(other)) == ({ord("c")}, {ord("a"), ord("b")})


def test_threads_may_compile_at_once(tokenizer_dir: Path) -> None:
    fresh = Grammars(tokenizer_dir, VOCAB_SIZE, sorted(EOS))
    sources = [chr(ord("a") + i % 20) for i in range(200)]
    with ThreadPoolExecutor(8) as pool:
        matchers = list(pool.map(lambda source: fresh.compile(Grammar("regex", source)), sources))
    assert [allowed(matcher) for matcher in matchers] == [{ord(source)} for source in sources]


@pytest.mark.parametrize(
    ("kind", "source", "field", "message"),
    [
        ("json_schema", "{", "response_format", "Expecting property name"),
        ("json_schema", "[]", "response_format", "must be an object or a boolean"),
        ("json_schema", '{"type": "objec"}', "response_format", "Invalid type: objec"),
        ("json_schema", '{"not": {}}', "response_format", 'Unimplemented keys: ["not"]'),
        ("json_schema", '{"$ref": "#/$defs/none"}', "response_format", "does not exist"),
        ("json_schema", '{"$ref": "http://127.0.0.1/x"}', "response_format", "does not fetch"),
        ("json_schema", "false", "response_format", "Unsatisfiable"),
        ("json_schema", "[" * 100_000, "response_format", "recursion"),
        ("json_schema", '{"items":' * 300 + "{}" + "}" * 300, "response_format", "recursion"),
        ("regex", "(a", "regex", "unclosed group"),
        ("regex", "(?=a)b", "regex", "look-around"),
        ("regex", "a{1000}" * 100_000, "regex", "longer than"),
        ("regex", "\ud800", "regex", "surrogates"),
        ("choice", "[]", "choice", "non-empty strings"),
        ("choice", '["a", ""]', "choice", "non-empty strings"),
        ("choice", '["a", 1]', "choice", "non-empty strings"),
        ("choice", "a", "choice", "Expecting value"),
        ("lark", "", "grammar", "Empty grammar"),
        ("lark", "start: other", "grammar", "unknown name"),
    ],
)
def test_a_grammar_that_is_not_valid_is_rejected(
    grammars: Grammars, kind: str, source: str, field: str, message: str
) -> None:
    grammar = Grammar(kind, source)  # type: ignore[arg-type]
    for check in (validate, grammars.compile):
        with pytest.raises(RequestRejected) as caught:
            check(grammar)
        assert caught.value.field == field
        assert str(caught.value).startswith(f"{field} cannot be used: ") and message in str(caught.value)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
        with pytest.raises(RequestRejected) as caught:
            check(grammar, "tools")
        assert caught.value.field == "tools"


@pytest.mark.parametrize(
    ("kind", "source", "text"),
    [
        ("regex", "((a{1,1000}){1,1000}){1,1000}", "a" * 200),
        ("regex", "(a|aa|aaa)*b{3,1000000}", "a" * 200),
        ("regex", ".*a.{20}", "ab" * 200),
        ("lark", 'start: a\na: a a a a | "x" |', "x" * 100),
        ("json_schema", json.dumps({"enum": [f"value {i}" for i in range(5000)]}), '"value 4999"'),
        ("json_schema", json.dumps({"properties": {f"p{i}": {} for i in range(2000)}}), '{"p7":1}'),
        ("json_schema", json.dumps({"type": "array", "minItems": 10**9, "items": {"minLength": 10**9}}), '["ab'),
    ],
)
def test_hostile_grammars_end_soon(grammars: Grammars, kind: str, source: str, text: str) -> None:
    assert len(source) < MAX_SOURCE
    try:
        matcher = grammars.compile(Grammar(kind, source))  # type: ignore[arg-type]
        for byte in text.encode():
            assert byte in allowed(matcher)
            matcher.accept(byte)
    except GrammarError as error:
        assert "too" in str(error) or "max is" in str(error)


def test_a_checkpoint_without_a_tokenizer_has_no_grammars(tmp_path: Path) -> None:
    with pytest.raises(RequestRejected, match="no tokenizer") as caught:
        Grammars(tmp_path, VOCAB_SIZE, ()).compile(Grammar("json_object", ""))
    assert caught.value.field == "response_format"


def test_logits_under_masks_are_a_copy_and_cover_odd_vocabularies() -> None:
    masks = allocate_masks(2, 70)
    assert masks.shape == (2, 3)
    masks[1, 0] = -(2**31) + 5  # bits 0, 2 and 31
    masks[1, 1:] = 0
    masks[1, 2] = 1 << 5  # token 69
    logits = torch.arange(140.0).view(2, 70)
    kept = apply_masks(logits, masks)
    assert torch.equal(kept[0], logits[0])
    assert torch.isfinite(kept[1]).nonzero().flatten().tolist() == [0, 2, 31, 69]
    assert torch.equal(logits, torch.arange(140.0).view(2, 70))


TOOLS = (
    Tool(
        "get_weather",
        "The weather",
        {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "where", "maxLength": 8},
                "days": {"$ref": "#/$defs/count"},
                "title": {"description": "of a property called title", "enum": ["a", "b"]},
            },
            "required": ["city"],
            "$defs": {"count": {"type": "integer", "minimum": 1, "maximum": 10}},
        },
    ),
    Tool("now"),
    Tool("send-it", parameters={"properties": {"to": {"type": "array", "items": {"type": "number"}, "maxItems": 3}}}),
)


def sentence(grammars: Grammars, grammar: Grammar, rng: random.Random) -> str:
    """A random sentence of the grammar, one byte after the other."""
    matcher, text = grammars.compile(grammar), bytearray()
    while not matcher.is_done and len(text) < 2000:
        options = allowed(matcher)
        if options & EOS and rng.random() < 0.5:
            break
        closing = sorted(options & set(b'"}]'))
        token = rng.choice(closing if closing and rng.random() < 0.3 else sorted(options - EOS - set(range(256, 261))))
        matcher.accept(token)
        text.append(token)
    assert allowed(matcher) & EOS
    return text.decode()


def assert_valid(name: str, arguments: dict[str, object]) -> None:
    match name:
        case "get_weather":
            assert {"city"} <= arguments.keys() <= {"city", "days", "title"}
            assert isinstance(arguments["city"], str) and len(arguments["city"]) <= 8
            assert arguments.get("days", 1) in range(1, 11) and arguments.get("title", "a") in ("a", "b")
        case "now":
            assert arguments == {}
        case _:
            assert name == "send-it" and arguments.keys() <= {"to"}
            to = arguments.get("to", [])
            assert isinstance(to, list) and len(to) <= 3 and all(isinstance(n, int | float) for n in to)


@pytest.mark.parametrize(("name", "parallel"), [(None, True), (None, False), ("get_weather", True), ("send-it", False)])
def test_a_grammar_for_tools_gives_calls_and_nothing_else(grammars: Grammars, name: str | None, parallel: bool) -> None:
    grammar = tool_grammar(TOOLS, name, parallel)
    rng = random.Random(17)
    counts: set[int] = set()
    called: set[str] = set()
    for _ in range(30):
        text = sentence(grammars, grammar, rng)
        content, calls = parse(text, [tool.name for tool in TOOLS], str)
        assert content == "" and calls, text
        for call in calls:
            assert_valid(call.name, json.loads(call.arguments))
            called.add(call.name)
        counts.add(min(len(calls), 2))
    assert called == ({name} if name else {tool.name for tool in TOOLS})
    assert counts == ({1, 2} if parallel else {1})


def test_the_form_of_a_call_is_the_chat_templates(grammars: Grammars) -> None:
    grammar = tool_grammar(TOOLS)
    text = '{"name": "get_weather", "parameters": {"city": "Paris", "days": 3, "title": "a"}}'
    assert accepts(grammars, grammar, text) and accepts(
        grammars, grammar, f'{text}\n{{"name": "now", "parameters": {{}}}}'
    )
    assert not accepts(grammars, grammar, text.replace("3", "11"))
    assert not accepts(grammars, grammar, text.replace("days", "hours"))
    assert not accepts(grammars, tool_grammar(TOOLS, "now"), text)


def test_tools_that_make_no_grammar_are_rejected() -> None:
    with pytest.raises(RequestRejected, match="not among the tools") as caught:
        tool_grammar(TOOLS, "other")
    assert caught.value.field == "tool_choice"
    with pytest.raises(RequestRejected) as caught:
        tool_grammar(())
    assert caught.value.field == "tools"
    with pytest.raises(RequestRejected, match=r"the schema of 'f' cannot be used: Unimplemented keys") as caught:
        tool_grammar([*TOOLS, Tool("f", parameters={"properties": {"x": {"not": {}}}})])
    assert caught.value.field == "tools"
    large = {"properties": {f"p{i}": {"const": "x" * 1000} for i in range(100)}}
    with pytest.raises(RequestRejected, match="longer than"):
        tool_grammar([Tool("f", parameters=large), Tool("g", parameters=large)])


def test_long_descriptions_do_not_count() -> None:
    wordy = {"type": "object", "properties": {"x": {"type": "string", "description": "x" * MAX_SOURCE}}}
    assert len(tool_grammar([Tool("f", parameters=wordy)]).source) < 1000
    kept = tool_grammar([Tool("f", parameters={"properties": {"x": {"const": {"description": "data"}}}})])
    assert '{"description": "data"}' in kept.source


def test_a_replayed_answer_goes_on_as_it_was(grammars):
    text = b'{"name":"Bo","age":31}'
    first = grammars.compile(Grammar("json_schema", PERSON))
    for cut in range(len(text) + 1):
        second = grammars.compile(Grammar("json_schema", PERSON))
        replay(second, text[:cut])
        assert allowed(second) == allowed(first) and second.is_done == first.is_done
        first.accept(text[cut] if cut < len(text) else EOT)
    with pytest.raises(RequestRejected, match="do not follow the grammar"):
        replay(grammars.compile(Grammar("json_schema", PERSON)), b"[")
