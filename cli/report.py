"""How the command line speaks: answers on stdout, everything else on stderr, any foreseeable fault as one sentence."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from cluster.config import ConfigError

P = ParamSpec("P")
R = TypeVar("R")


class CliError(Exception):
    """A fault that the user can act on: one sentence, and the exit code (1: it failed, 2: what was asked is wrong)."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def out() -> Console:
    return Console(highlight=False)


def err() -> Console:
    return Console(stderr=True, highlight=False)


def complain(message: str) -> None:
    for line in message.splitlines():
        print(f"herder: {line}", file=sys.stderr)


def table(*columns: str, title: str | None = None) -> Table:
    """A table whose first column is text and whose others are right-aligned."""
    result = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        result.add_column(column, justify="right" if i else "left", no_wrap=True)
    return result


def named_lines(rows: dict[str, str]) -> Table:
    """Texts under each other, each behind its name; long ones are folded."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in rows.items():
        grid.add_row(name, text)
    return grid


def verb(function: Callable[P, R]) -> Callable[P, R]:
    """Turns the faults of a command into a sentence on stderr and an exit code."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except ConfigError as error:
            complain(str(error))
            raise typer.Exit(2) from None
        except CliError as error:
            complain(str(error))
            raise typer.Exit(error.code) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except BrokenPipeError:  # whoever read our output has gone; keep the interpreter from flushing into it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None

    return run
