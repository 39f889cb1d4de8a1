"""The bundled tiny checkpoint: complete, small, readable by transformers, and right on its tasks, pictures included."""

from __future__ import annotations

import base64
import io
import json
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, Llama4ForConditionalGeneration, PreTrainedTokenizerFast

from checkpoints.pictures import PICTURE_TASKS, picture_example
from checkpoints.tasks import TASKS, Example
from checkpoints.tiny_batches import Encoder
from checkpoints.tiny_eval import answers, expert_load, prompt_ids
from engine.image_spec import ImageSpec

TINY = Path(__file__).resolve().parents[2] / "checkpoints" / "tiny"
MAX_BYTES = 12_000_000
PER_TASK = 10


@pytest.fixture(scope="module")
def loaded() -> tuple[Llama4ForConditionalGeneration, dict]:
    """The model in float32 with what transformers says about loading it."""
    model, info = Llama4ForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32, output_loading_info=True)
    return model.eval(), info


@pytest.fixture(scope="module")
def model(loaded: tuple[Llama4ForConditionalGeneration, dict]) -> Llama4ForConditionalGeneration:
    return loaded[0]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def spec() -> ImageSpec:
    spec = ImageSpec.from_dir(TINY)
    assert spec is not None
    return spec


@pytest.fixture(scope="module")
def questions() -> dict[str, list[Example]]:
    """The evaluation set by task."""
    by_task: dict[str, list[Example]] = defaultdict(list)
    for line in (TINY / "eval.jsonl").read_text(encoding="utf-8").splitlines():
        item = json.loads(line)
        pictures = [Image.open(io.BytesIO(base64.b64decode(png, validate=True))) for png in item.get("images", ())]
        by_task[item["task"]].append(picture_example(item["task"], item["prompt"], item["answer"], *pictures))
    return by_task


def chat_ids(tokenizer: PreTrainedTokenizerFast, messages: list[dict]) -> torch.Tensor:
    """A conversation's [1, L] ids with the assistant's header opened."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])


def greedy(model: Llama4ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, ids_1L: torch.Tensor) -> str:
    """The model's answer without special tokens; it must end its turn by itself."""
    with torch.inference_mode():
        output_1L = model.generate(ids_1L, attention_mask=torch.ones_like(ids_1L), do_sample=False, max_new_tokens=16)
    assert output_1L[0, -1] in model.generation_config.eos_token_id
    return tokenizer.decode(output_1L[0, ids_1L.shape[1] :], skip_special_tokens=True).strip()


def test_reloads_without_missing_weights(loaded: tuple[Llama4ForConditionalGeneration, dict]) -> None:
    _, info = loaded
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert not info["unexpected_keys"]


def test_is_small_and_sharded() -> None:
    assert sum(path.stat().st_size for path in TINY.rglob("*") if path.is_file()) <= MAX_BYTES
    index = json.loads((TINY / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) >= 2
    assert all((TINY / shard).is_file() for shard in shards)


def test_has_every_kind_of_llama4_layer(model: Llama4ForConditionalGeneration) -> None:
    config = model.config.text_config
    assert config.num_local_experts == 16
    assert config.num_experts_per_tok == 1
    assert 0 < len(config.moe_layers) < config.num_hidden_layers
    assert set(config.layer_types) == {"chunked_attention", "full_attention"}
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.use_qk_norm


@pytest.mark.parametrize(
    "text", ["17+25=", "naïve café — 東京 🦙", "user\n\nassistant\n", "  two  spaces ,  dots ...", "\x00\t"]
)
def test_tokenizer_round_trip(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id == tokenizer.convert_tokens_to_ids("<|begin_of_text|>")
    assert tokenizer.decode(ids[1:]) == text
    assert max(ids) < len(tokenizer)


def test_every_byte_is_one_token(tokenizer: PreTrainedTokenizerFast) -> None:
    for text in ("17+25=", "strawberry", "é"):
        assert tokenizer(text, add_special_tokens=False).input_ids == list(text.encode())


def test_chat_template_shape(tokenizer: PreTrainedTokenizerFast) -> None:
    text = tokenizer.apply_chat_template(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "17+25="}]},
            {"role": "assistant", "content": "42"},
            {"role": "tool", "content": "7"},
        ],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert text == (
        "<|begin_of_text|><|header_start|>system<|header_end|>\n\nBe brief.<|eot|>"
        "<|header_start|>user<|header_end|>\n\n<|image|>17+25=<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\n42<|eot|>"
        "<|header_start|>ipython<|header_end|>\n\n7<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\n"
    )


def test_chat_template_lists_tools_and_calls(tokenizer: PreTrainedTokenizerFast) -> None:
    tool = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
    call = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Time?"}, {"role": "assistant", "content": None, "tool_calls": [call]}],
        tools=[tool],
        tokenize=False,
    )
    system, user, assistant = text.removesuffix("<|eom|>").split("<|eot|>")
    assert '"name": "clock"' in system
    assert user.endswith("Time?")
    assert '<|python_start|>{"name": "clock", "parameters": {"zone": "UTC"}}<|python_end|>' in assistant


def test_evaluation_set(questions: dict[str, list[Example]]) -> None:
    assert set(questions) == {*TASKS, *PICTURE_TASKS}
    for task, group in questions.items():
        assert len({(question.key, question.prompt) for question in group}) == len(group) >= 20
        assert [len(question.pictures) for question in group] == [
            {"compare": 2}.get(task, task in PICTURE_TASKS)
        ] * len(group)


def test_stored_pictures_were_never_trained_on(questions: dict[str, list[Example]]) -> None:
    """PNG keeps the pixels, so the side of the split can be told from what is stored."""
    assert all(question.held_out for task in PICTURE_TASKS for question in questions[task])


@pytest.mark.parametrize("task", [*TASKS, *PICTURE_TASKS])
def test_answers(
    model: Llama4ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    spec: ImageSpec,
    questions: dict[str, list[Example]],
    task: str,
) -> None:
    asked = questions[task][:PER_TASK]
    right = sum(text == question.answer for question, text in answers(model, tokenizer, spec, asked))
    assert right >= len(asked) - 1


def test_conversation_and_completion(model: Llama4ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "17+25="},
        {"role": "assistant", "content": "42"},
        {"role": "user", "content": "48-6="},
    ]
    assert greedy(model, tokenizer, chat_ids(tokenizer, messages)) == "42"
    assert greedy(model, tokenizer, torch.tensor([tokenizer("17+25=").input_ids])) == "42"


def test_every_expert_is_used(
    model: Llama4ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    spec: ImageSpec,
    questions: dict[str, list[Example]],
) -> None:
    asked = [question for group in questions.values() for question in group[:30]]
    loads = expert_load(model, tokenizer, spec, asked)
    assert min(share for shares in loads.values() for share in shares) >= 0.005


@pytest.mark.parametrize("task", ["addition", "digit", "compare"])
def test_training_samples_are_what_the_chat_template_writes(
    tokenizer: PreTrainedTokenizerFast, spec: ImageSpec, questions: dict[str, list[Example]], task: str
) -> None:
    encoder = Encoder(tokenizer, spec)
    for question in questions[task][:20]:
        sample = encoder.conversation([question])
        asked = prompt_ids(tokenizer, spec, question)
        assert sample.ids[: len(asked)] == asked
        assert sample.answered == [False] * len(asked) + [True] * (len(sample.ids) - len(asked))
        assert tokenizer.decode(sample.ids[len(asked) :]) == question.answer + "<|eot|>"
        patches = sum(len(tiles_NCHW) for tiles_NCHW in sample.tiles_NCHW) * spec.tokens_per_tile
        assert sample.ids.count(spec.patch_token_id) == patches
