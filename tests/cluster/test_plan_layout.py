"""Which hardware is enough, and where actors go: as Ray is asked, and as the actors allocate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.engine_parts import layer_groups
from cluster.config import DeploymentConfig, Strategy, load_config
from cluster.machines import MACHINES
from cluster.model_shape import PRECISIONS
from cluster.placement import bundles, plan_experts
from cluster.plan_layout import Misfit, Workload, actors_of_split, best_split, least_devices, over_nodes
from cluster.planner import plan, plan_deployment
from cluster.presets import PRESETS, model_at, preset_shape
from cluster.roofline import Split
from llama4.config import TextConfig
from llama4.decoder import Decoder
from llama4.kv_pages import KVPages
from llama4.moe import Experts

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_is_planned_as_it_is_started(path: Path) -> None:
    config = load_config(path)
    model = _text_config(config)
    on_gpus = config.experts.num_gpus > 0
    planned = plan_deployment(config, model_at(config.model.path), "h100" if on_gpus else "cpu", 4096, 1)
    layout = planned.layout
    assert layout and layout.experts and planned.misfit is None

    groups = bundles(config)
    assert layout.attention.actors == len(groups["attention"].bundles)
    assert layout.experts.actors == len(groups["experts"].bundles)
    experts = plan_experts(config, model.num_local_experts, model.moe_layers)
    for slot, held in enumerate(layout.experts_per_actor):
        assert {len(of_layer) for of_layer in experts.experts_of(slot).values()} == {held}

    pages = {kind: group.pages for kind, group in layer_groups(config, model).items()}
    dtype = torch.bfloat16 if on_gpus else torch.float32
    assert layout.attention.kv == KVPages(model, config.engine.page_size, pages, dtype, "meta").nbytes
    decoder = Decoder(model, dtype, "meta")
    assert layout.attention.weights == sum(tensor.nbytes for _, tensor in decoder.tensors())
    fullest = max(range(len(layout.experts_per_actor)), key=lambda slot: layout.experts_per_actor[slot])
    assert layout.experts.weights == Experts(model, experts.experts_of(fullest), dtype, "meta").nbytes


def _text_config(config: DeploymentConfig) -> TextConfig:
    if config.model.path.is_dir():
        return TextConfig.from_dir(config.model.path)
    name = model_at(config.model.path).name
    return TextConfig.from_dict(PRESETS[name].config)


def test_strategies_decide_on_the_nodes() -> None:
    scout = load_config(ROOT / "configs" / "scout_8xh100.yaml")
    layout = plan_deployment(scout, preset_shape("scout"), "h100", 4096, 1).layout
    assert layout and [(node.attention, node.experts) for node in layout.nodes] == [((0, 1, 2, 3), (0, 1, 2, 3))]
    maverick = load_config(ROOT / "configs" / "maverick_4x8h100.yaml")
    layout = plan_deployment(maverick, preset_shape("maverick"), "h100", 4096, 1).layout
    assert layout and [(len(node.attention), len(node.experts)) for node in layout.nodes] == [(4, 4)] * 4

    wide = load_config(ROOT / "configs" / "scout_8xh100.yaml", ["attention.actors=9"])
    planned = plan_deployment(wide, preset_shape("scout"), "h100", 4096, 1)
    assert planned.layout is None and planned.misfit and "9 actors" in planned.misfit


def test_what_a_configuration_cannot_hold_is_said() -> None:
    config = load_config(ROOT / "configs" / "scout_8xh100.yaml", ["experts.actors=2", "experts.per_actor=8"])
    planned = plan_deployment(config, preset_shape("scout"), "h100", 4096, 1)
    assert planned.misfit == "an expert actor needs 96.6 GB for weights and KV, and has 72.0 GB for them"
    assert plan_deployment(config, preset_shape("scout"), "h200", 4096, 1).misfit is None


STRATEGIES: st.SearchStrategy[Strategy] = st.sampled_from(("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"))


@given(st.lists(st.tuples(st.integers(0, 9), STRATEGIES), min_size=1, max_size=3), st.integers(1, 9), st.integers(1, 4))
def test_every_actor_gets_a_place_as_its_role_asks(
    roles: list[tuple[int, Strategy]], per_node: int, least: int
) -> None:
    if any(actors > per_node for actors, strategy in roles if strategy == "STRICT_PACK"):
        with pytest.raises(Misfit, match="STRICT_PACK"):
            over_nodes(roles, per_node, least)
        return
    nodes = over_nodes(roles, per_node, least)
    assert len(nodes) >= least and all(sum(map(len, node)) <= per_node for node in nodes)
    for role, (actors, strategy) in enumerate(roles):
        on_nodes = [node[role] for node in nodes]
        assert sorted(actor for held in on_nodes for actor in held) == list(range(actors))
        if strategy == "STRICT_PACK":
            assert sum(bool(held) for held in on_nodes) <= 1
        if strategy == "STRICT_SPREAD":
            assert max(map(len, on_nodes)) <= 1


works = st.builds(
    Workload,
    st.sampled_from([preset_shape(name) for name in PRESETS]),
    st.sampled_from([machine for machine in MACHINES.values()]),
    st.sampled_from(PRECISIONS),
    st.integers(1, 200_000),
    st.integers(1, 300),
)


@given(works)
def test_the_least_hardware_is_enough_and_no_less_is(work: Workload) -> None:
    try:
        attention, experts = least_devices(work)
    except Misfit:
        too_large = work.attention_weights + work.sequence_bytes > work.usable
        assert too_large or work.expert_weights(1) > work.usable
        return
    moe = work.shape.moe

    def fits(attention: int, experts: int) -> bool:
        if min(attention, experts if moe else 1) == 0:
            return False
        own = work.attention_weights + -(-work.batch // attention) * work.sequence_bytes
        held = work.expert_weights(-(-moe.experts // experts)) if moe else 0
        return max(own, held) <= work.usable

    assert fits(attention, experts)
    assert not fits(attention - 1, experts)
    assert not moe or not fits(attention, experts - 1)
    if attention + experts > 1:
        with pytest.raises(Misfit, match="too few"):
            best_split(work, attention + experts - 1)
    split = best_split(work, attention + experts + 3)
    assert fits(split.attention, len(split.held)) and split.attention + len(split.held) == split.devices
    actors = actors_of_split(work, split)
    assert actors.sequences >= work.batch and len(actors.on_nodes) == split.nodes


@given(works, st.integers(0, 40))
def test_a_larger_batch_is_never_slower_in_all(work: Workload, more: int) -> None:
    held = (2, 1, 1) if work.shape.moe else ()
    split = Split(attention=3, held=held, devices=6, nodes=2)
    larger = Workload(work.shape, work.machine, work.precision, work.context, work.batch + more)
    assert larger.batch / larger.step(split).seconds >= work.batch / work.step(split).seconds * (1 - 1e-9)


def test_what_does_not_fit_has_a_reason_and_no_layout() -> None:
    planned = plan(preset_shape("llama-3.1-405b"), "h100", "bf16", 8192, 1)
    assert planned.layout is None and planned.speed.decode == () and planned.experts is None
    assert planned.misfit and "811.7 GB" in planned.misfit and planned.least.by_memory == 12
    few = plan(preset_shape("scout"), "h100", "bf16", 8192, 1, devices=4)
    assert few.misfit == "4 devices are too few: 1 for attention and 4 for experts are the least"
    assert few.least.devices == 5
