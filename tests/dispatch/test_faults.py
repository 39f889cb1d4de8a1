"""Faults strike whom, when and as often as the script says."""

import pickle
import signal

import pytest

from dispatch.faults import Fault, Faults

HEADER = b"header"


def test_a_fault_strikes_its_member_at_its_step_and_layer() -> None:
    script = pickle.loads(pickle.dumps([Fault("drop", "expert", 2, step=4, layer=1)]))
    faults = Faults(script, "expert", 2)
    assert faults.strike(4, 0, HEADER) == HEADER and faults.strike(3, 1, HEADER) == HEADER
    assert faults.strike(4, 1, HEADER) is None
    assert faults.strike(4, 1, HEADER) == HEADER
    for role, member in (("expert", 1), ("attention", 2)):
        assert Faults(script, role, member).strike(4, 1, HEADER) == HEADER  # type: ignore[arg-type]


@pytest.mark.parametrize(("times", "struck"), [(1, 1), (3, 3), (None, 5)])
def test_it_strikes_so_many_times(times: int | None, struck: int) -> None:
    faults = Faults([Fault("drop", "expert", 0, times=times)], "expert", 0)
    assert [faults.strike(step, 0, HEADER) for step in range(5)].count(None) == struck


def test_what_it_does() -> None:
    done: list[object] = []
    script = [
        Fault("kill", "attention", 1, step=0),
        Fault("stop", "attention", 1, step=1),
        Fault("delay", "attention", 1, step=2, seconds=0.5),
        Fault("corrupt", "attention", 1, step=3),
    ]
    faults = Faults(script, "attention", 1, send_signal=done.append, sleep=done.append)
    for step in range(3):
        assert faults.strike(step, 9, HEADER) == HEADER
    assert done == [signal.SIGKILL, signal.SIGSTOP, 0.5]
    corrupted = faults.strike(3, 9, HEADER)
    assert corrupted is not None and len(corrupted) == len(HEADER) and corrupted != HEADER


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="seconds"):
        Fault("delay", "expert", 0)
    with pytest.raises(ValueError, match="times"):
        Fault("drop", "expert", 0, times=0)
