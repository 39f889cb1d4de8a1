from __future__ import annotations

import json
from pathlib import Path

import pytest

from llama4.config import RopeScaling, TextConfig
from tests.llama4.reference import SMALL, save_random

SCOUT_ROPE = {
    "rope_type": "llama3",
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}


def test_both_layouts_of_config_json_say_the_same(tmp_path: Path) -> None:
    flat = save_random(tmp_path / "flat", seed=0)
    assert flat == save_random(tmp_path / "nested", seed=0, conditional=True)


def test_both_spellings_of_rope_say_the_same() -> None:
    old = TextConfig.from_dict({**SMALL, "rope_theta": 7.0, "rope_scaling": SCOUT_ROPE})
    new = TextConfig.from_dict({**SMALL, "rope_parameters": {"rope_theta": 7.0, **SCOUT_ROPE}})
    assert old == new
    assert old.rope_theta == 7.0 and old.rope_scaling == RopeScaling(16.0, 1.0, 1.0, 8192)
    plain = TextConfig.from_dict({**SMALL, "rope_theta": 7.0, "rope_scaling": None})
    assert plain == TextConfig.from_dict({**SMALL, "rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}})
    assert plain.rope_scaling is None


def test_maverick_shaped_layers() -> None:
    change = {"num_hidden_layers": 8, "interleave_moe_layer_step": 2, "no_rope_layers": []}
    config = TextConfig.from_dict({**SMALL, **change})
    assert config.moe_layers == (1, 3, 5, 7)
    assert config.rope_layers == (0, 1, 2, 4, 5, 6)
    assert config.layer_kinds == ("chunked", "chunked", "chunked", "full") * 2


def test_layer_types_and_no_rope_layers_are_independent() -> None:
    types = ["full_attention", "full_attention", "chunked_attention", "chunked_attention"]
    config = TextConfig.from_dict({**SMALL, "layer_types": types, "no_rope_layers": [0, 1, 0, 1]})
    assert config.layer_kinds == ("full", "full", "chunked", "chunked")
    assert config.rope_layers == (1, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_attention_heads": "four"}, "num_attention_heads must be a positive whole number, not 'four'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads must divide"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok must be at most num_local_experts"),
        ({"hidden_act": "gelu"}, "hidden_act must be silu"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters: rope_type must be default or llama3"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling: factor is missing"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types must be made of"),
        ({"layer_types": ["full_attention"]}, "layer_types must have an entry per layer"),
        ({"moe_layers": [4]}, "moe_layers must be layers between 0 and 3"),
        ({"model_type": "mixtral"}, "model_type is 'mixtral'"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps must be"),
    ],
)
def test_errors_name_the_file_and_the_key(change: dict[str, object], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, **change}))
    with pytest.raises(ValueError, match=message) as error:
        TextConfig.from_dir(tmp_path)
    assert "config.json" in str(error.value)


def test_a_missing_or_broken_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        TextConfig.from_dir(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        TextConfig.from_dir(tmp_path)
    with pytest.raises(ValueError, match="router_scores must be sigmoid or softmax"):
        TextConfig.from_dict(SMALL, "tanh")  # type: ignore[arg-type]
