"""What counts as a stream's time per token beside a burst."""

from __future__ import annotations

import pytest

from bench.burst import Round, Watched, rows


def test_time_per_token_of_a_window():
    """What came at once counts as often as it has tokens; a stream without two tokens there says nothing."""
    watched = Watched([[0.0, 1.0, 3.0, 3.0, 9.0], [2.5, 2.75], [], [1.5]])
    assert watched.per_token(0.5, 4.0) == pytest.approx([1.0, 0.25])
    assert watched.pauses(0.5, 4.0) == pytest.approx([2.0, 0.0, 0.25])


def test_rows():
    [row] = rows([Round([0.010, 0.020, 0.030], [0.021, 0.025, 0.9], (0.1, 0.2), [1.0, 4.0, 2.0])])
    assert (row["ms/token"], row["beside images"]) == pytest.approx((20.0, 25.0))
    assert (row["ratio"], row["median image s"], row["last image s"]) == (pytest.approx(1.25), 2.0, 4.0)
