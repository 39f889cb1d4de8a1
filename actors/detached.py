"""Calls of Ray actors that outlive the client for whom a gateway makes them."""

from __future__ import annotations

import contextvars
from typing import Any

from ray import ObjectRef
from ray.actor import ActorMethod


def call_detached(method: ActorMethod, *args: object) -> ObjectRef[Any]:
    """Calls `method.remote(*args)` in a context of its own.

    Serve cancels the Ray task of a client that goes away, and Ray all that was called in that task. The task is known
    by the context.
    """
    answer: ObjectRef[Any] = contextvars.Context().run(method.remote, *args)
    return answer
