"""Byte-level tokenizer for the tiny checkpoint.

One token per byte keeps digits and letters apart, which the arithmetic and spelling tasks need, and makes every UTF-8
string encodable. The special tokens carry Llama 4's names so that servers written for the real model find them.
"""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|header_start|>",
    "<|header_end|>",
    "<|eom|>",
    "<|eot|>",
    "<|step|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|image_start|>",
    "<|image_end|>",
    "<|image|>",
    "<|patch|>",
    "<|tile_x_separator|>",
    "<|tile_y_separator|>",
    "<|finetune_right_pad|>",
)
# Whole-segment tokens: a chat turn would otherwise spend most of its length on spelling out its header.
SEGMENT_TOKENS = ("system", "user", "assistant", "ipython", "\n\n")

CHAT_TEMPLATE = """\
{%- macro text_of(content) -%}
  {%- if content is string -%}
    {{- content -}}
  {%- elif content is not none -%}
    {%- for part in content -%}
      {%- if part.type == 'text' -%}
        {{- part.text -}}
      {%- elif part.type == 'image' or part.type == 'image_url' -%}
        {{- '<|image|>' -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- macro open_turn(role) -%}
  {{- '<|header_start|>' + role + '<|header_end|>\\n\\n' -}}
{%- endmacro -%}
{{- '<|begin_of_text|>' -}}
{%- set turns = messages -%}
{%- set instructions = '' -%}
{%- if messages and messages[0].role == 'system' -%}
  {%- set instructions = text_of(messages[0].content) | trim -%}
  {%- set turns = messages[1:] -%}
{%- endif -%}
{%- if instructions or tools -%}
  {{- open_turn('system') + instructions -}}
  {%- if tools -%}
    {{- '\\n\\n' if instructions else '' -}}
    {{- 'Functions you may call:\\n' -}}
    {%- for tool in tools -%}
      {{- tool | tojson + '\\n' -}}
    {%- endfor -%}
    {{- 'To call one, answer with {"name": ..., "parameters": {...}} alone.' -}}
  {%- endif -%}
  {{- '<|eot|>' -}}
{%- endif -%}
{%- for message in turns -%}
  {{- open_turn('ipython' if message.role == 'tool' else message.role) -}}
  {%- if message.tool_calls -%}
    {{- text_of(message.content) -}}
    {{- '<|python_start|>' -}}
    {%- for call in message.tool_calls -%}
      {%- set function = call.function if call.function is defined else call -%}
      {{- '{"name": ' + function.name | tojson + ', "parameters": ' -}}
      {{- (function.arguments if function.arguments is string else function.arguments | tojson) + '}' -}}
      {{- '' if loop.last else '\\n' -}}
    {%- endfor -%}
    {{- '<|python_end|><|eom|>' -}}
  {%- else -%}
    {{- text_of(message.content) | trim + '<|eot|>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- open_turn('assistant') -}}
{%- endif -%}
"""


def byte_alphabet() -> list[str]:
    """The printable stand-in the ByteLevel pre-tokenizer writes for each byte, indexed by byte value."""
    keep = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    shifted = iter(range(256, 512))
    return [chr(byte) if byte in keep else chr(next(shifted)) for byte in range(256)]


def build_tokenizer(model_max_length: int) -> PreTrainedTokenizerFast:
    """Build the tokenizer. Token id b < 256 is byte b; segment tokens and then special tokens follow.

    Args:
        model_max_length: Longest sequence the model takes, recorded in tokenizer_config.json.
    """
    alphabet = byte_alphabet()
    vocab = {symbol: byte for byte, symbol in enumerate(alphabet)}
    for segment in SEGMENT_TOKENS:
        vocab["".join(alphabet[byte] for byte in segment.encode())] = len(vocab)

    # With ignore_merges a pre-token found whole in the vocabulary is one token; without merges the rest stay bytes.
    # Only blank lines split the text, so "user" is one token as a header and four inside a sentence.
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("\n\n"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS])
    bos = "<|begin_of_text|>"
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
    )

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token="<|eot|>",
        pad_token="<|finetune_right_pad|>",
        padding_side="left",
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
