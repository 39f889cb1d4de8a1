"""What a step gate answers, whatever the transport."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepAnswer:
    """What the gate says of the next step.

    `idle`: there is none, wait. `leaving`: there will be none. `renewed`: experts that were out of reach may be back.
    """

    idle: bool
    leaving: bool = False
    renewed: bool = False
