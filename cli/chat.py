"""`herder chat`: ask the model, once or in a conversation."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from cli import endpoint
from cli.endpoint import Message
from cli.report import CliError, complain, err, verb

Ask = Callable[[Sequence[Message]], Iterator[str]]


@verb
def chat(
    prompt: Annotated[str | None, typer.Argument(help="Ask this and end; without it, a conversation begins.")] = None,
    url: Annotated[
        str | None,
        typer.Option(help="The server, if it is not this user's own: http://host:port, or host:port with --grpc."),
    ] = None,
    grpc: Annotated[bool, typer.Option("--grpc", help="Ask over gRPC instead of HTTP.")] = False,
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    image: Annotated[
        list[str] | None, typer.Option(help="A picture to show with the (first) question: a file or a URL. Repeatable.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.0,
    max_tokens: Annotated[
        int | None, typer.Option(help="The longest answer; without it, what the context has room for.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The served model's name; without it, whichever is served.")] = None,
    http_port: Annotated[int | None, typer.Option(help="Which of this user's deployments, where several run.")] = None,
) -> None:
    """Ask the model. The answer streams to standard output.

    Without PROMPT it is a conversation: an empty line or Ctrl-D ends it, Ctrl-C cuts an answer short. A PROMPT may also
    come through a pipe.

    Examples:

        herder chat "17+25="

        herder chat --grpc --max-tokens 64 "Reverse the word camel."

        herder chat --url http://10.0.0.7:8000 --system "Answer in one word."

        herder chat --image left.png --image right.png "Which of the two has more dots?"
    """
    sampling = endpoint.Sampling(model, temperature, max_tokens)
    ask: Ask
    if grpc:
        ask = functools.partial(endpoint.stream_grpc, endpoint.grpc_server(url, http_port), sampling=sampling)
    else:
        ask = functools.partial(endpoint.stream_http, endpoint.http_server(url, http_port), sampling=sampling)
    history = [Message("system", system)] if system else []
    images = tuple(map(read_image, image or ()))
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().strip()
        if not prompt:
            raise CliError("the prompt on standard input is empty", code=2)
    if prompt is not None:
        answer(ask, [*history, Message("user", prompt, images)])
    else:
        converse(ask, history, images)


def read_image(where: str) -> bytes | str:
    """The file's bytes; a URL as it is, for the server. Raises CliError."""
    if where.startswith(("data:", "http://", "https://")):
        return where
    try:
        return Path(where).read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CliError(f"--image: {where} cannot be read ({reason})", code=2) from None


def answer(ask: Ask, messages: Sequence[Message]) -> str:
    """Prints the answer as it comes, ending its line whatever happens."""
    pieces: list[str] = []
    try:
        for piece in ask(messages):
            sys.stdout.write(piece)
            sys.stdout.flush()
            pieces.append(piece)
    finally:
        if pieces:
            sys.stdout.write("\n")
            sys.stdout.flush()
    if not pieces:
        sys.stdout.write("\n")
    return "".join(pieces)


def converse(ask: Ask, history: Sequence[Message], images: tuple[bytes | str, ...] = ()) -> None:
    """`images` go with the first thing that is said and answered."""
    messages = list(history)
    err().print("An empty line or Ctrl-D ends the conversation.", style="dim")
    while True:
        try:
            said = input("> ").strip()
        except EOFError:
            sys.stdout.write("\n")
            return
        if not said:
            return
        turn = [*messages, Message("user", said, images)]
        try:
            messages, images = [*turn, Message("assistant", answer(ask, turn))], ()
        except CliError as error:
            complain(str(error))
        except KeyboardInterrupt:
            err().print("(cut short; this turn is forgotten)", style="dim")
