"""`herder`: the command line. One file for each verb."""

from __future__ import annotations

import typer

from cli.chaos import chaos
from cli.chat import chat
from cli.drain import drain
from cli.eval import evaluate
from cli.join import join
from cli.move import move
from cli.plan import plan
from cli.rebalance import rebalance
from cli.render import app as render
from cli.scale import scale
from cli.serve import serve
from cli.status import status
from cli.stop import stop
from cli.up import up
from cli.validate import validate

app = typer.Typer(
    help="Serve Llama 4 on Ray: attention actors, expert actors, and the tokens that travel between them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(serve)
app.command()(up)
app.command()(join)
app.command()(chat)
app.command()(status)
app.command("eval")(evaluate)
app.command()(validate)
app.command()(plan)
app.add_typer(render, name="render")
app.command()(scale)
app.command()(move)
app.command()(rebalance)
app.command()(drain)
app.command()(stop)
app.command()(chaos)


def main() -> None:
    app()
