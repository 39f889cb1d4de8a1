"""Faults by script: what shall go wrong, where and when, for tests and drills.

A Fault is plain data and travels to the member that it is for; Faults is that member's runtime. Without faults the
transport holds None and asks nothing.
"""

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Action = Literal["kill", "stop", "drop", "delay", "corrupt"]


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
        action: kill or stop (SIGKILL, SIGSTOP) the member's process; drop a message; delay it by `seconds`; corrupt its
            header. A dispatcher does it to what it sends, an expert server to its answers.
        role, member: whom it befalls: an attention rank or a slot.
        step, layer: when; None for any.
        seconds: of a delay.
        times: how often it happens; None for always.

    Raises:
        ValueError: a delay without seconds, or times below 1.
    """

    action: Action
    role: Literal["attention", "expert"]
    member: int
    step: int | None = None
    layer: int | None = None
    seconds: float = 0.0
    times: int | None = 1

    def __post_init__(self) -> None:
        if self.action == "delay" and self.seconds <= 0:
            raise ValueError(f"a delay needs seconds above 0, got {self.seconds}")
        if self.times is not None and self.times < 1:
            raise ValueError(f"times must be 1 or more, got {self.times}")

    def matches(self, step: int, layer: int) -> bool:
        """Whether it is for this step and layer."""
        return (self.step is None or self.step == step) and (self.layer is None or self.layer == layer)


class Faults:
    """The faults of one member. For one thread.

    Args:
        script: faults of any members; the others' are left out.
        role, member: whose this is.
        send_signal: sends a signal to this process.
        sleep: waits for a number of seconds.
    """

    def __init__(
        self,
        script: Sequence[Fault],
        role: Literal["attention", "expert"],
        member: int,
        send_signal: Callable[[signal.Signals], None] = lambda number: os.kill(os.getpid(), number),
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._left = [(fault, fault.times) for fault in script if (fault.role, fault.member) == (role, member)]
        self._send_signal = send_signal
        self._sleep = sleep

    def strike(self, step: int, layer: int, header: bytes) -> bytes | None:
        """Let happen what is due for a message: its header as it shall be sent, or None if it shall not be."""
        struck: bytes | None = header
        for place, (fault, left) in enumerate(self._left):
            if left == 0 or not fault.matches(step, layer):
                continue
            if left is not None:
                self._left[place] = fault, left - 1
            if fault.action == "kill":
                self._send_signal(signal.SIGKILL)
            elif fault.action == "stop":
                self._send_signal(signal.SIGSTOP)
            elif fault.action == "delay":
                self._sleep(fault.seconds)
            elif fault.action == "drop":
                struck = None
            elif struck is not None:
                struck = bytes(byte ^ 0xFF for byte in struck)
        return struck
