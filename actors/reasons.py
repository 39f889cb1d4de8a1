"""Errors in a line."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """What an error says, or what caused it in another process, without its traces."""
    return (str(getattr(error, "cause", None) or error).strip() or type(error).__name__).splitlines()[0]
