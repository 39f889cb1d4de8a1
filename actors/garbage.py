"""Python's garbage collector, out of the way of tokens."""

from __future__ import annotations

import gc


def keep_all_there_is() -> None:
    """No later collection looks at the objects that exist now. For processes that have just come up.

    They are modules and their like, which stay for as long as the process does. To look through those of torch and Ray
    takes 0.2 seconds, in which no other thread of Python's runs.
    """
    gc.freeze()
