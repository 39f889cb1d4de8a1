"""Messages of protos/herder/v1 as plain data: conversations, tools, sampling.

Raises RequestRejected, naming the field.
"""

from __future__ import annotations

from collections.abc import Iterable

from actors.image_prompt import Chat, Content, ImagePart, template_content
from actors.tool_use import ToolUse
from actors.validation import Options, json_text, json_value, template_role
from engine.request import Grammar, RequestRejected
from engine.tools import Tool
from herder.v1 import inference_pb2, types_pb2


def conversation(messages: Iterable[inference_pb2.ChatMessage]) -> Chat:
    """As chat templates take it: OpenAI's form."""
    contents = [(message, [_part(part) for part in message.content]) for message in messages]
    images = [part for _, content in contents for part in content if isinstance(part, ImagePart)]
    return Chat([_message(message, content) for message, content in contents], images)


def _part(part: inference_pb2.ContentPart) -> str | ImagePart:
    match part.WhichOneof("part"):
        case "text":
            return part.text
        case "image" if part.image.WhichOneof("source") == "data":
            return ImagePart(part.image.data)
        case "image" if part.image.WhichOneof("source") == "url":
            return ImagePart(part.image.url)
        case "image":
            raise RequestRejected("messages: an image must have data or a url", field="messages")
    raise RequestRejected("messages: a content part must have a text or an image", field="messages")


def _message(message: inference_pb2.ChatMessage, content: Content) -> dict[str, object]:
    role = template_role(message.role)
    found: dict[str, object] = {"role": role, "content": template_content(role, content)}
    if message.tool_calls:
        if message.role != "assistant":
            raise RequestRejected("messages: only the assistant has tool_calls", field="messages")
        found["tool_calls"] = [_tool_call(call) for call in message.tool_calls]
    if message.tool_call_id:
        found["tool_call_id"] = message.tool_call_id
    return found


def _tool_call(call: inference_pb2.ToolCall) -> dict[str, object]:
    if not isinstance(json_value(call.arguments, "messages"), dict):
        raise RequestRejected("messages: the arguments of a tool call must be a JSON object", field="messages")
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def tool_use(tools: inference_pb2.Tools) -> ToolUse:
    """The tools of a conversation; no definitions are no tools."""
    definitions = tuple(_tool(tool) for tool in tools.definitions)
    parallel = tools.parallel_calls if tools.HasField("parallel_calls") else True
    if tools.WhichOneof("choice") == "name":
        return ToolUse(definitions, "named", tools.name, parallel)
    match tools.mode:
        case inference_pb2.TOOL_CHOICE_MODE_UNSPECIFIED | inference_pb2.TOOL_CHOICE_MODE_AUTO:
            return ToolUse(definitions, "auto", parallel=parallel)
        case inference_pb2.TOOL_CHOICE_MODE_NONE:
            return ToolUse(definitions, "none", parallel=parallel)
        case inference_pb2.TOOL_CHOICE_MODE_REQUIRED:
            return ToolUse(definitions, "required", parallel=parallel)
    raise RequestRejected(f"tool_choice: there is no mode {tools.mode}", field="tool_choice")


def _tool(tool: inference_pb2.ToolDefinition) -> Tool:
    if not tool.parameters:
        return Tool(tool.name, tool.description)
    parameters = json_value(tool.parameters, "tools")
    if not isinstance(parameters, dict):
        raise RequestRejected("tools: parameters must be a JSON object", field="tools")
    return Tool(tool.name, tool.description, parameters)


def options(
    sampling: types_pb2.SamplingParams, treatment: inference_pb2.RequestOptions, deadline: float | None
) -> Options:
    """`deadline` in Unix seconds."""
    has = sampling.HasField
    return Options(
        n=sampling.n if has("n") else None,
        max_tokens=sampling.max_tokens if has("max_tokens") else None,
        min_tokens=sampling.min_tokens if has("min_tokens") else None,
        temperature=sampling.temperature if has("temperature") else None,
        top_p=sampling.top_p if has("top_p") else None,
        top_k=sampling.top_k if has("top_k") else None,
        min_p=sampling.min_p if has("min_p") else None,
        repetition_penalty=sampling.repetition_penalty if has("repetition_penalty") else None,
        presence_penalty=sampling.presence_penalty if has("presence_penalty") else None,
        frequency_penalty=sampling.frequency_penalty if has("frequency_penalty") else None,
        logit_bias=dict(sampling.logit_bias),
        seed=sampling.seed if has("seed") else None,
        ignore_eos=sampling.ignore_eos,
        stop=sampling.stop,
        stop_token_ids=sampling.stop_token_ids,
        logprobs=sampling.logprobs if has("logprobs") else None,
        prompt_logprobs=sampling.prompt_logprobs if has("prompt_logprobs") else None,
        skip_special_tokens=sampling.skip_special_tokens if has("skip_special_tokens") else True,
        grammar=_grammar(sampling.grammar) if has("grammar") else None,
        priority=treatment.priority,
        cache_salt=treatment.cache_salt,
        deadline=deadline,
    )


def _grammar(grammar: types_pb2.Grammar) -> Grammar:
    match grammar.WhichOneof("kind"):
        case "json_schema":
            return Grammar("json_schema", json_text(json_value(grammar.json_schema, "grammar")))
        case "json_object":
            return Grammar("json_object", "")
        case "regex" if grammar.regex:
            return Grammar("regex", grammar.regex)
        case "choice" if grammar.choice.choices:
            return Grammar("choice", json_text(list(grammar.choice.choices)))
        case "lark" if grammar.lark:
            return Grammar("lark", grammar.lark)
        case None:
            raise RequestRejected("grammar must have a kind", field="grammar")
        case kind:
            raise RequestRejected(f"grammar: {kind} must not be empty", field="grammar")
