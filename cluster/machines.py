"""Machines to plan for: what a device of each kind has, by its vendor's data sheet.

Rates are the vendor's peaks for dense matrices (data sheets often print the double, for 2:4 sparsity), sizes are
decimal, link rates count one direction.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.config_errors import ConfigError
from cluster.model_shape import Precision

GB, TB = 10**9, 10**12
TERA = 10**12

# What a device multiplies in that has no unit for a precision: weights are then converted as they are read.
_INSTEAD: dict[Precision, Precision] = {"int4": "bf16", "int8": "bf16", "fp8": "bf16", "bf16": "fp32"}


@dataclass(frozen=True, slots=True)
class Machine:
    """A node of equal devices.

    `memory`: bytes of a device. `bandwidth`: of that memory, bytes/s. `rates`: FLOP/s (OP/s) by precision. `link`,
    `network`: bytes/s that a device can send to others of its node, and to other nodes.
    """

    title: str
    devices_per_node: int
    memory: int
    bandwidth: float
    rates: Mapping[Precision, float]
    link: float
    network: float
    sources: tuple[str, ...]

    def computes_in(self, precision: Precision) -> Precision:
        """What matrices with weights of `precision` are multiplied in."""
        while precision not in self.rates:
            precision = _INSTEAD[precision]
        return precision

    def rate(self, precision: Precision) -> float:
        """FLOP/s with weights of `precision`."""
        return self.rates[self.computes_in(precision)]


MACHINES: dict[str, Machine] = {
    "h100": Machine(
        title="8 x NVIDIA H100 SXM 80 GB",
        devices_per_node=8,
        memory=80 * GB,
        bandwidth=3.35 * TB,
        rates={"fp32": 67 * TERA, "bf16": 989.4 * TERA, "fp8": 1978.9 * TERA, "int8": 1978.9 * TERA},
        link=450 * GB,  # NVLink 4: 900 GB/s both ways
        network=50 * GB,  # one 400 Gb/s ConnectX-7 for each GPU
        sources=("NVIDIA H100 Tensor Core GPU data sheet (SXM)", "NVIDIA DGX H100 data sheet (network)"),
    ),
    "h200": Machine(
        title="8 x NVIDIA H200 SXM 141 GB",
        devices_per_node=8,
        memory=141 * GB,
        bandwidth=4.8 * TB,
        rates={"fp32": 67 * TERA, "bf16": 989.4 * TERA, "fp8": 1978.9 * TERA, "int8": 1978.9 * TERA},
        link=450 * GB,
        network=50 * GB,
        sources=("NVIDIA H200 Tensor Core GPU data sheet (SXM)", "NVIDIA DGX H200 data sheet (network)"),
    ),
    "b200": Machine(
        title="8 x NVIDIA B200 180 GB",
        devices_per_node=8,
        memory=180 * GB,  # DGX B200: 1,440 GB in all
        bandwidth=8 * TB,
        rates={"fp32": 80 * TERA, "bf16": 2250 * TERA, "fp8": 4500 * TERA, "int8": 4500 * TERA},
        link=900 * GB,  # NVLink 5: 1.8 TB/s both ways
        network=50 * GB,
        sources=("NVIDIA Blackwell architecture technical brief (HGX B200)", "NVIDIA DGX B200 data sheet"),
    ),
    "a100": Machine(
        title="8 x NVIDIA A100 SXM 80 GB",
        devices_per_node=8,
        memory=80 * GB,
        bandwidth=2.039 * TB,
        rates={"fp32": 19.5 * TERA, "bf16": 312 * TERA, "int8": 624 * TERA},
        link=300 * GB,  # NVLink 3: 600 GB/s both ways
        network=25 * GB,  # one 200 Gb/s ConnectX-6 for each GPU
        sources=("NVIDIA A100 Tensor Core GPU data sheet (SXM, 80 GB)", "NVIDIA DGX A100 80 GB data sheet (network)"),
    ),
    # A plain server without matrix units: AMD EPYC 7543, 32 cores x 2.8 GHz x 32 (two 256-bit fused multiply-adds),
    # eight channels of DDR4-3200. Actors of one machine hand rows over by a copy in memory, which reads and writes.
    "cpu": Machine(
        title="CPU server, 32 AVX2 cores, 512 GB",
        devices_per_node=1,
        memory=512 * GB,
        bandwidth=204.8 * GB,
        rates={"fp32": 2.87 * TERA},
        link=102.4 * GB,
        network=12.5 * GB,  # 100 Gb/s Ethernet
        sources=("AMD EPYC 7543 product specifications (clock, cores, memory channels)",),
    ),
}


def find_machine(name: str) -> str:
    """The key of the machine that `name` (h100, H100-80G) means. Raises ConfigError naming --machine."""
    key = name.lower().removesuffix("-80g")
    if key in MACHINES:
        return key
    near = difflib.get_close_matches(key, MACHINES, n=1)
    hint = f"; the nearest is {near[0]}" if near else ""
    raise ConfigError([f"--machine must be one of {', '.join(MACHINES)}, not {name!r}{hint}"])
