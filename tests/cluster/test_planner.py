"""`herder plan`'s arithmetic: against published figures, against checkpoints, and by hand."""

from __future__ import annotations

import doctest
import json
import math
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cluster.plan_layout
import cluster.plan_units
from cluster.checkpoint_shape import shape_of, shape_of_dir, text_shape
from cluster.config_errors import ConfigError
from cluster.machines import MACHINES, find_machine
from cluster.model_shape import PRECISIONS, GroupedAttention, ModelShape, Moe, Precision
from cluster.plan_report import DeploymentPlan
from cluster.planner import plan
from cluster.presets import PRESETS, find_model, model_at, preset_shape
from cluster.roofline import Split, compute_bound_batch, compute_bound_rows, decode_step
from llama4.config import TextConfig
from llama4.decoder import Decoder
from llama4.moe import Experts

ROOT = Path(__file__).parents[2]
GB = 10**9


def test_the_worked_examples() -> None:
    for module in (cluster.plan_layout, cluster.plan_units):
        result = doctest.testmod(module)
        assert result.attempted and not result.failed


@pytest.mark.parametrize(
    ("name", "total", "active", "bf16_gb", "int4_gb"),
    [
        # Meta, "The Llama 4 herd" (April 2025): 109B and 400B parameters, 17B active.
        ("scout", 109e9, 17e9, 218, 55),
        ("maverick", 400e9, 17e9, 800, 200),
        # Mixtral of Experts, arXiv 2401.04088, and Mistral's announcement: 46.7B and 12.9B.
        ("mixtral-8x7b", 46.7e9, 12.9e9, 93.4, 23.4),
        # DeepSeek-V3 Technical Report, arXiv 2412.19437: 671B and 37B, without multi-token prediction.
        ("deepseek-v3", 671e9, 37e9, 1342, 335.5),
        ("llama-3.1-405b", 405e9, 405e9, 810, 202.5),
    ],
)
def test_published_sizes(name: str, total: float, active: float, bf16_gb: float, int4_gb: float) -> None:
    parameters = plan(preset_shape(name), "h100", "bf16", 4096, 1).parameters
    assert parameters.total == pytest.approx(total, rel=0.02)
    assert parameters.active == pytest.approx(active, rel=0.02)
    assert parameters.total_bytes["bf16"] / GB == pytest.approx(bf16_gb, rel=0.02)
    assert parameters.total_bytes["int4"] / GB == pytest.approx(int4_gb, rel=0.02)
    assert sum(part.parameters for part in parameters.parts) == parameters.total


def test_scouts_routed_expert_and_the_combinations() -> None:
    scout = plan(preset_shape("scout"), "h100", "bf16", 4096, 1).experts
    assert scout and scout.flops_per_token_and_layer == 2 * 3 * 5120 * 8192
    assert scout.flops_per_token_and_layer / 1e9 == pytest.approx(0.25, abs=0.005)
    counts = {name: shape.moe.combinations for name in PRESETS if (shape := preset_shape(name)).moe}
    assert counts == {
        "scout": 16,
        "maverick": 128,
        "mixtral-8x7b": 8 * 7 // 2,
        "deepseek-v3": math.comb(256, 8),
    }


def test_kv_of_ten_million_tokens() -> None:
    kv = plan(preset_shape("scout"), "h100", "bf16", 10_000_000, 1).kv
    assert (kv.bytes_per_token_and_layer, kv.full_layers, kv.chunked_layers, kv.chunk) == (4096, 12, 36, 8192)
    longest = kv.contexts[-1]
    assert longest.full_layer == 40_960_000_000 and longest.chunked_layer == 8192 * 4096
    assert longest.naive == 48 * 40_960_000_000
    assert longest.hybrid == 12 * 40_960_000_000 + 36 * 8192 * 4096


@pytest.mark.parametrize(("name", "bytes_per_token"), [("deepseek-v3", 70_272), ("llama-3.1-405b", 516_096)])
def test_published_kv_of_a_token(name: str, bytes_per_token: int) -> None:
    """Table 1 of "Insights into DeepSeek-V3", arXiv 2505.09343."""
    assert plan(preset_shape(name), "h100", "bf16", 4096, 1).kv.bytes_per_token == bytes_per_token


def test_a_checkpoint_has_as_many_parameters_as_are_counted() -> None:
    path = ROOT / "checkpoints" / "tiny"
    stored = 0
    for file in path.glob("*.safetensors"):
        data = file.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        stored += sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    assert shape_of_dir(path).total == stored


@given(
    hidden=st.sampled_from((16, 48)),
    kv_heads=st.sampled_from((1, 2, 4)),
    layers=st.integers(1, 5),
    step=st.integers(1, 3),
    experts=st.integers(1, 5),
    tied=st.booleans(),
    bias=st.booleans(),
)
def test_each_actor_holds_what_is_counted(
    hidden: int, kv_heads: int, layers: int, step: int, experts: int, tied: bool, bias: bool
) -> None:
    config = TextConfig.from_dict(
        {
            "vocab_size": 32,
            "hidden_size": hidden,
            "intermediate_size": 24,
            "intermediate_size_mlp": 40,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": kv_heads,
            "head_dim": 8,
            "num_local_experts": experts,
            "interleave_moe_layer_step": step,
            "tie_word_embeddings": tied,
            "attention_bias": bias,
        }
    )
    shape = text_shape(config, "drawn")
    held = {name: tensor.numel() for name, tensor in Decoder(config, torch.float32, "meta").tensors()}
    assert shape.beside_experts == sum(held.values())
    one_each = Experts(config, {layer: [0] for layer in config.moe_layers}, torch.float32, "meta")
    assert shape.parts["routed experts"] == experts * one_each.nbytes // 4
    assert shape.total == shape.beside_experts + shape.parts["routed experts"]


def test_decoding_by_hand() -> None:
    shape = ModelShape(
        name="small",
        hidden=1000,
        layers=2,
        vocab=10,
        attention=GroupedAttention(heads=2, kv_heads=1, head_dim=100),
        moe=Moe(layers=1, experts=4, top_k=2, width=1000),
        dense_width=1000,
        max_context=10_000,
    )
    machine = MACHINES["h100"]
    step = decode_step(shape, machine, "bf16", 5000, 1, Split(attention=1, held=(1, 1, 1, 1), devices=5, nodes=2))
    beside = 2 * 2 * 1000 * 100 * 3 + 3 * 1000**2 + 4 * 1000 + 2 * 10 * 1000 + 5 * 1000
    kv = 2 * 5000 * 200 * 2  # layers x tokens x numbers x bytes
    assert step.attention_s == pytest.approx((2 * (beside - 10 * 1000) + kv) / machine.bandwidth)
    assert step.experts_s == pytest.approx(2 * 3 * 1000**2 / machine.bandwidth)
    assert step.transfer_s == pytest.approx(
        2 * 2 * 2000 / 2 / machine.network
    )  # both rows there and back, half off node
    assert step.limit == "attention memory"
    # Expected number of experts that some of three tokens chose, each two of four: 4 x (1 - (1/2)^3).
    assert shape.moe and shape.moe.touched(3) == pytest.approx(3.5)


@pytest.mark.parametrize("name", ["scout", "maverick", "deepseek-v3"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_where_experts_become_compute_bound(name: str, precision: Precision) -> None:
    """At that batch the time to read an expert's weights is the time to multiply with them."""
    shape, machine = preset_shape(name), MACHINES["h100"]
    moe, batch = shape.moe, compute_bound_batch(shape, machine, precision)
    assert moe and batch
    rows = batch * moe.top_k / moe.experts
    assert rows == pytest.approx(compute_bound_rows(machine, precision), rel=0.01)
    split = Split(attention=1, held=(1,) * moe.experts, devices=2 + moe.experts, nodes=1)
    below, above = (decode_step(shape, machine, precision, 1, at, split).experts_s for at in (batch // 2, 2 * batch))
    assert above == pytest.approx(2 * below, rel=0.02)


def test_h100_needs_295_rows_in_bf16() -> None:
    assert compute_bound_rows(MACHINES["h100"], "bf16") == pytest.approx(989.4e12 / 3.35e12)
    assert compute_bound_batch(preset_shape("scout"), MACHINES["h100"], "bf16") == 4725


def test_a_plan_is_the_same_after_json() -> None:
    for name in PRESETS:
        planned = plan(preset_shape(name), "b200", "fp8", 8192, 32, nodes=8)
        assert DeploymentPlan.model_validate_json(planned.model_dump_json()) == planned


def test_what_a_machine_has_no_units_for_is_assumed_aloud() -> None:
    a100 = plan(preset_shape("scout"), "a100", "fp8", 8192, 1)
    assert a100.machine.computes_in == "bf16" and a100.machine.flops_per_s == 312e12
    assert any("no FP8 units" in one for one in a100.assumptions)
    assert MACHINES["cpu"].computes_in("int4") == "fp32"


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"model_type": "bert"}, "model_type is 'bert'"),
        ({"model_type": "mixtral"}, "c.json: hidden_size is required"),
        (
            dict(PRESETS["deepseek-v3"].config) | {"kv_lora_rank": "big"},
            "kv_lora_rank must be a whole number, not 'big'",
        ),
        (dict(PRESETS["deepseek-v3"].config) | {"moe_layer_freq": 2}, "moe_layer_freq must be 1, not 2"),
        ({"model_type": "llama4_text"}, "num_hidden_layers is missing"),
    ],
)
def test_a_config_json_that_cannot_be_read_is_named(values: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError) as raised:
        shape_of(values, "x", "c.json")
    assert sentence in str(raised.value) and "c.json" in str(raised.value)


def test_names(tmp_path: Path) -> None:
    assert find_machine("H100-80G") == "h100"
    with pytest.raises(ConfigError, match=r"--machine must be one of .*; the nearest is h200"):
        find_machine("h20")
    with pytest.raises(ConfigError, match="the nearest is maverick"):
        find_model("mavrick")
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        find_model(str(tmp_path))
    assert model_at(Path("/nowhere/Llama-4-Scout-17B-16E-Instruct")).name == "scout"
    with pytest.raises(ConfigError, match=r"model\.path: there is no directory /nowhere/x"):
        model_at(Path("/nowhere/x"))
