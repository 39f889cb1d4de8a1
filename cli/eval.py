"""`herder eval`: ask a deployment questions with known answers, and count."""

from __future__ import annotations

import asyncio
import base64
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import grpc
import httpx
import typer
from pydantic import BaseModel
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from cli import endpoint
from cli.endpoint import Message, Server
from cli.report import CliError, err, out, table, verb
from cli.runfile import find_run
from herder.v1 import inference_pb2, inference_pb2_grpc

LONGEST_ANSWER = 64  # tokens
# Names that --task takes beside the tasks' own: all that show no image, all that show one.
TEXT, VISION = "text", "vision"


@dataclass(frozen=True, slots=True)
class Question:
    """`images`: encoded files, which the model sees before the prompt."""

    task: str
    prompt: str
    answer: str
    images: tuple[bytes, ...] = ()

    @property
    def kind(self) -> str:
        return VISION if self.images else TEXT


class _Line(BaseModel):
    """A question as it stands in its file."""

    task: str
    prompt: str
    answer: str
    images: tuple[str, ...] = ()


Ask = Callable[[Question], Awaitable[str]]


@verb
def evaluate(
    url: Annotated[
        str | None,
        typer.Option(help="The server, if it is not this user's own: http://host:port, or host:port with --grpc."),
    ] = None,
    use_grpc: Annotated[bool, typer.Option("--grpc", help="Ask over gRPC instead of HTTP.")] = False,
    data: Annotated[
        Path | None,
        typer.Option(
            help="JSON lines of task, prompt, answer and, for questions about images, images (a list of files in "
            "base64); without it, eval.jsonl beside the served model."
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--task", help="Only this task; 'vision' for all that show images, 'text' for all others. Repeatable."
        ),
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Questions asked at a time.")] = 16,
    min_accuracy: Annotated[float, typer.Option(min=0, max=1, help="What every task must reach.")] = 0.95,
    http_port: Annotated[int | None, typer.Option(help="Which of this user's deployments, where several run.")] = None,
) -> None:
    """Ask each question as one user message at temperature 0, and print the accuracy per task.

    Exit code 1 if a task stays below --min-accuracy.

    Examples:

        herder eval

        herder eval --task vision

        herder eval --grpc --task addition --concurrency 4

        herder eval --url http://10.0.0.7:8000 --data questions.jsonl
    """
    questions = read_questions(data or Path(find_run(http_port).model_dir) / "eval.jsonl", tasks or ())
    if use_grpc:
        asker = ask_grpc(endpoint.grpc_server(url, http_port))
    else:
        asker = ask_http(endpoint.http_server(url, http_port))
    right = asyncio.run(count_right(questions, asker, concurrency))
    asked = Counter(question.task for question in questions)
    report(right, asked)
    low = sorted(task for task in asked if right[task] < min_accuracy * asked[task])
    if low:
        raise CliError(f"below {min_accuracy:.0%}: {', '.join(low)}")


def read_questions(path: Path, tasks: Sequence[str]) -> list[Question]:
    """The questions in the JSON lines file `path`, only those of `tasks` if any. Raises CliError naming the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CliError(f"--data: {path} cannot be read ({error})", code=2) from None
    questions = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            questions.append(parse_question(line))
        except ValueError:
            shape = "must be a JSON object with task, prompt, answer and, if it shows any, images in base64"
            raise CliError(f"{path}:{number}: {shape}", code=2) from None
    if not questions:
        raise CliError(f"--data: {path} holds no question", code=2)
    known = sorted({name for question in questions for name in (question.task, question.kind)})
    for task in tasks:
        if task not in known:
            raise CliError(f"--task: {path} has no task {task!r}; it has {', '.join(known)}", code=2)
    return [question for question in questions if not tasks or question.task in tasks or question.kind in tasks]


def parse_question(line: str) -> Question:
    """Raises ValueError for what is no question."""
    read = _Line.model_validate_json(line)
    images = tuple(base64.b64decode(image, validate=True) for image in read.images)
    return Question(read.task, read.prompt, read.answer, images)


@asynccontextmanager
async def ask_http(server: Server) -> AsyncIterator[Ask]:
    url, model = server.where, endpoint.http_model(server)
    sampling = endpoint.Sampling(max_tokens=LONGEST_ANSWER)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=url, timeout=endpoint.TIMEOUT, limits=limits, headers=server.headers
    ) as client:

        async def ask(question: Question) -> str:
            body = endpoint.chat_body(messages_of(question), sampling, model, stream=False)
            try:
                response = await client.post("/v1/chat/completions", json=body)
            except httpx.HTTPError as error:
                raise endpoint.http_fault(url, error) from None
            endpoint.check_http(url, response)
            return str(response.json()["choices"][0]["message"]["content"] or "")

        yield ask


@asynccontextmanager
async def ask_grpc(server: Server) -> AsyncIterator[Ask]:
    sampling = endpoint.Sampling(max_tokens=LONGEST_ANSWER)
    async with server.aio_channel() as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)

        async def ask(question: Question) -> str:
            streamed = endpoint.chat_stream_request(messages_of(question), sampling)
            request = inference_pb2.ChatRequest(messages=streamed.messages, sampling=streamed.sampling)
            try:
                answer = await stub.Chat(request, metadata=server.metadata)
                return str(answer.choices[0].text)
            except grpc.RpcError as error:
                raise endpoint.grpc_fault(server.where, error) from None

        yield ask


def messages_of(question: Question) -> list[Message]:
    return [Message("user", question.prompt, question.images)]


async def count_right(
    questions: Sequence[Question], asker: AbstractAsyncContextManager[Ask], concurrency: int
) -> Counter[str]:
    """How many answers of each task are right. The first failed request ends it all."""
    right: Counter[str] = Counter()
    turn = asyncio.Semaphore(concurrency)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    console = err()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("asking", total=len(questions))
        async with asker as ask:

            async def one(question: Question) -> None:
                async with turn:
                    answer = await ask(question)
                right[question.task] += answer.strip() == question.answer.strip()
                progress.advance(bar)

            try:
                async with asyncio.TaskGroup() as group:
                    for question in questions:
                        group.create_task(one(question))
            except BaseExceptionGroup as faults:
                raise faults.exceptions[0] from None
    return right


def report(right: Counter[str], asked: Counter[str]) -> None:
    rows = table("task", "right", "asked", "accuracy")
    for task in sorted(asked):
        rows.add_row(task, str(right[task]), str(asked[task]), f"{right[task] / asked[task]:.1%}")
    rows.add_section()
    rows.add_row("all", str(right.total()), str(asked.total()), f"{right.total() / asked.total():.1%}")
    out().print(rows)
