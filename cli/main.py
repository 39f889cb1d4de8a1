"""`herder`: the command line. One file for each verb."""

from __future__ import annotations

import typer

from cli.chat import chat
from cli.drain import drain
from cli.eval import evaluate
from cli.serve import serve
from cli.status import status
from cli.stop import stop
from cli.validate import validate

app = typer.Typer(
    help="Serve Llama 4 on Ray: attention actors and expert actors, joined by all-to-all.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(serve)
app.command()(chat)
app.command()(status)
app.command("eval")(evaluate)
app.command()(validate)
app.command()(drain)
app.command()(stop)


def main() -> None:
    app()
