"""`plan`: what a model costs, on which hardware it fits, how its actors would lie there, how fast it could decode.

Pure arithmetic over a `ModelShape` and a `Machine`; nothing is measured, no weights are read.
"""

from __future__ import annotations

from dataclasses import replace

from cluster.config import DeploymentConfig
from cluster.machines import MACHINES
from cluster.model_shape import PRECISIONS, ModelShape, Precision, weight_bytes
from cluster.plan_assumptions import assumptions
from cluster.plan_layout import (
    Actors,
    Misfit,
    Workload,
    actors_of_config,
    actors_of_split,
    best_split,
    least_devices,
)
from cluster.plan_report import (
    DecodeReport,
    DeploymentPlan,
    ExpertsReport,
    KvContextReport,
    KvReport,
    LayoutReport,
    LeastReport,
    MachineReport,
    NodeReport,
    ParametersReport,
    PartReport,
    RoleReport,
    SpeedReport,
    TransferReport,
    VisionReport,
)
from cluster.plan_units import size
from cluster.roofline import (
    compute_bound_batch,
    compute_bound_rows,
    row_bytes,
    single_stream_bound,
)

CONTEXTS = (131_072, 1_000_000, 10_000_000)  # whose KV is shown beside the planned one's, if the model takes so many
MAX_BATCH = 65_536  # the curve over the batch ends here, or where experts become compute-bound


def plan(
    shape: ModelShape,
    machine: str,
    precision: Precision,
    context: int,
    batch: int,
    devices: int | None = None,
    nodes: int | None = None,
) -> DeploymentPlan:
    """`batch` sequences of `context` tokens on `devices`, on all those of `nodes`, or on as few as there must be.

    `machine` is a key of MACHINES.
    """
    work = Workload(shape, MACHINES[machine], precision, context, batch)
    if devices is None and nodes is not None:
        devices = nodes * work.machine.devices_per_node
    try:
        return _report(machine, work, actors_of_split(work, best_split(work, devices, nodes)), None)
    except Misfit as misfit:
        return _report(machine, work, None, str(misfit))


def plan_deployment(
    config: DeploymentConfig, shape: ModelShape, machine: str, context: int, batch: int, nodes: int | None = None
) -> DeploymentPlan:
    """The actors that `herder serve` starts for `config`, on machines of that kind.

    Raises ConfigError where the seats do not fit the experts.
    """
    precision = precision_of(config)
    work = Workload(shape, MACHINES[machine], precision, context, batch)
    vision = None
    if shape.vision_parameters:
        vision = VisionReport(
            min_replicas=config.vision.min_replicas,
            max_replicas=config.vision.max_replicas,
            device=config.vision.device,
            weights=weight_bytes(shape.vision_parameters, precision),
        )
    try:
        return _report(machine, work, actors_of_config(work, config, nodes), None, vision)
    except Misfit as misfit:
        return _report(machine, work, None, str(misfit))


def precision_of(config: DeploymentConfig) -> Precision:
    """What the deployment computes in; `auto` is what `choose_dtype` makes of it."""
    if config.model.dtype == "auto":
        return "bf16" if config.attention.device == "cuda" else "fp32"
    return "bf16" if config.model.dtype == "bfloat16" else "fp32"


def _report(
    machine: str, work: Workload, actors: Actors | None, misfit: str | None, vision: VisionReport | None = None
) -> DeploymentPlan:
    layout = _layout(work, actors, vision) if actors else None
    return DeploymentPlan(
        model=work.shape.name,
        machine=_machine(machine, work),
        precision=work.precision,
        context=work.context,
        batch=work.batch,
        parameters=_parameters(work.shape, work.precision),
        experts=_experts(work.shape),
        kv=_kv(work),
        least=_least(work),
        layout=layout,
        misfit=misfit or (_overflow(layout) if layout else None),
        transfer=_transfer(work, actors),
        speed=_speed(work, actors),
        assumptions=tuple(assumptions(work)),
    )


def _machine(name: str, work: Workload) -> MachineReport:
    machine = work.machine
    return MachineReport(
        name=name,
        title=machine.title,
        devices_per_node=machine.devices_per_node,
        memory=machine.memory,
        bandwidth=machine.bandwidth,
        flops_per_s=machine.rate(work.precision),
        computes_in=machine.computes_in(work.precision),
        link=machine.link,
        network=machine.network,
        sources=machine.sources,
    )


def _parameters(shape: ModelShape, precision: Precision) -> ParametersReport:
    columns = [one for one in PRECISIONS if one != "fp32" or precision == "fp32"]
    sizes = {name: {one: weight_bytes(number, one) for one in columns} for name, number in shape.parts.items()}
    return ParametersReport(
        total=shape.total,
        active=shape.active,
        active_share=shape.active / shape.total,
        parts=tuple(
            PartReport(name=name, parameters=number, bytes=sizes[name])
            for name, number in shape.parts.items()
            if number
        ),
        total_bytes={one: weight_bytes(shape.total, one) for one in columns},
    )


def _experts(shape: ModelShape) -> ExpertsReport | None:
    moe = shape.moe
    if moe is None:
        return None
    return ExpertsReport(
        moe_layers=moe.layers,
        experts=moe.experts,
        top_k=moe.top_k,
        combinations=moe.combinations,
        parameters_each=shape.expert_parameters,
        flops_per_token_and_layer=shape.expert_flops,
    )


def _kv(work: Workload) -> KvReport:
    shape, each = work.shape, work.shape.kv_token_bytes(work.precision)
    contexts = sorted({work.context, *(context for context in CONTEXTS if context <= shape.max_context)})
    return KvReport(
        bytes_per_token_and_layer=each,
        bytes_per_token=each * shape.layers,
        full_layers=shape.layers - shape.chunked_layers,
        chunked_layers=shape.chunked_layers,
        chunk=shape.chunk or None,
        contexts=tuple(
            KvContextReport(
                context=context,
                hybrid=shape.kv_bytes(context, work.precision),
                naive=shape.naive_kv_bytes(context, work.precision),
                full_layer=each * context,
                chunked_layer=each * min(context, shape.chunk) if shape.chunked_layers else None,
            )
            for context in contexts
        ),
    )


def _least(work: Workload) -> LeastReport:
    try:
        attention, experts = least_devices(work)
    except Misfit:
        return LeastReport(by_memory=work.devices_by_memory, attention=None, experts=None, devices=None, nodes=None)
    devices = attention + experts
    return LeastReport(
        by_memory=work.devices_by_memory,
        attention=attention,
        experts=experts,
        devices=devices,
        nodes=-(-devices // work.machine.devices_per_node),
    )


def _layout(work: Workload, actors: Actors, vision: VisionReport | None) -> LayoutReport:
    split = actors.split
    # Actors of one node share its devices evenly: each has one of its own, or all of them have parts.
    crowd = max(sum(len(role) for role in node) for node in actors.on_nodes)
    room = int(work.usable * min(1.0, work.machine.devices_per_node / crowd))
    experts = None
    if split.held:
        experts = RoleReport(actors=len(split.held), weights=work.expert_weights(max(split.held)), kv=0, room=room)
    return LayoutReport(
        devices=split.devices,
        attention=RoleReport(actors=split.attention, weights=work.attention_weights, kv=actors.attention_kv, room=room),
        experts=experts,
        experts_per_actor=split.held,
        nodes=tuple(NodeReport(attention=attention, experts=slots) for attention, slots in actors.on_nodes),
        sequences=actors.sequences,
        vision=vision,
    )


def _overflow(layout: LayoutReport) -> str | None:
    """Which role's actors need more than they have."""
    roles = {"attention": layout.attention, "expert": layout.experts}
    too_large = [
        f"an {name} actor needs {size(role.weights + role.kv)} for weights and KV, and has {size(role.room)} for them"
        for name, role in roles.items()
        if role and not role.fits
    ]
    return "; ".join(too_large) or None


def _transfer(work: Workload, actors: Actors | None) -> TransferReport | None:
    moe = work.shape.moe
    if moe is None:
        return None
    per_layer = 2 * moe.top_k * row_bytes(work.shape, work.precision)
    return TransferReport(
        bytes_per_token_and_layer=per_layer,
        bytes_per_token=per_layer * moe.layers,
        off_node_share=1 - 1 / actors.split.nodes if actors else None,
    )


def _speed(work: Workload, actors: Actors | None) -> SpeedReport:
    shape, machine, precision = work.shape, work.machine, work.precision
    bound = compute_bound_batch(shape, machine, precision)
    batches = {work.batch} | ({bound} if bound else set())
    size = 1
    while size <= min(MAX_BATCH, 2 * (bound or MAX_BATCH)):
        batches.add(size)
        size *= 4
    return SpeedReport(
        flops_per_token=shape.flops(work.context),
        single_stream_tokens_per_s=single_stream_bound(shape, machine, precision, work.context),
        compute_bound_rows=compute_bound_rows(machine, precision),
        compute_bound_batch=bound,
        decode=tuple(_decode(work, batch, actors) for batch in sorted(batches)) if actors else (),
    )


def _decode(work: Workload, batch: int, actors: Actors) -> DecodeReport:
    step = replace(work, batch=batch).step(actors.split)
    return DecodeReport(
        batch=batch,
        tokens_per_s=batch / step.seconds,
        attention_s=step.attention_s,
        experts_s=step.experts_s,
        transfer_s=step.transfer_s,
        limit=step.limit,
        fits=batch <= actors.sequences,
    )
