"""`herder chaos`: harm a running deployment, and see whether anybody notices."""

from __future__ import annotations

import asyncio
import random
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from cli import endpoint
from cli.chaos_harm import ENDING, Action, Hand, Look, Watch, choose, in_random_order, is_whole
from cli.chaos_streams import Prompt, asking, keep_asking, make_prompts, undisturbed
from cli.chaos_tally import Harm, Tally, duration, spread
from cli.report import CliError, err, out, table, verb
from herder.v1 import control_pb2 as pb
from herder.v1 import control_pb2_grpc, inference_pb2_grpc

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_LOOK_EVERY_S = 0.1
_PATIENCE_S = 180.0  # for full strength to come back, and for the last answers
_REASONS = 5  # of lost and changed answers, that are shown


def seconds(text: str) -> float:
    """A time such as 60s, 500ms or 2m; without a unit, it is in seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h)?", text.strip())
    value = float(found[1]) * _UNITS[found[2] or "s"] if found else 0.0
    if not value:
        raise typer.BadParameter(f"must be a time such as 60s, 2m or 500ms, not {text!r}")
    return value


@dataclass(frozen=True, slots=True)
class Plan:
    """What is done to a deployment: something every `every_s` seconds, for `for_s` seconds, while `streams` run."""

    for_s: float
    every_s: float
    streams: int
    actions: tuple[Action, ...]
    seed: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was counted before anything was harmed, and from then on."""

    calm: Tally
    harmed: Tally


@verb
def chaos(
    for_: Annotated[str, typer.Option("--for", metavar="TIME", help="How long, as 60s or 5m.")] = "60s",
    every: Annotated[str, typer.Option(metavar="TIME", help="From one harm to the next.")] = "10s",
    streams: Annotated[int, typer.Option(min=1, help="Requests that run at a time.")] = 16,
    actions: Annotated[
        list[Action] | None,
        typer.Option("--action", help="What is done. Repeatable; without it, everything that ends an actor."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of prompts, and of what is done to whom.")] = 0,
    url: Annotated[
        str | None, typer.Option(help="The server's gRPC address, if it is not this user's own: host:port.")
    ] = None,
    http_port: Annotated[int | None, typer.Option(help="Which of this user's deployments, where several run.")] = None,
) -> None:
    """Kill and stop actors of a running deployment while requests run, and compare every answer token by token.

    First it asks its prompts undisturbed, half of them greedy and half sampled with a seed. Then it asks them over and
    over while it does harm: in random order, an action each --every, but not before the deployment is back at full
    strength. Exit code 1 if an answer was lost or came out differently, or if full strength does not come back.

    kill-* is SIGKILL; stop-expert is SIGSTOP: the process hangs, and the deployment has to find out and end it.
    drop-expert and delay-expert harm messages between actors that live: with sockets (transport.kind p2p), the next
    answers of an expert actor get lost, or come late. Actors on other machines, and messages, are reached if this one
    is a node of their Ray cluster.

    Examples:

        herder chaos --for 60s

        herder chaos --for 5m --every 20s --streams 100 --action kill-expert --action stop-expert --seed 7
    """
    plan = Plan(seconds(for_), seconds(every), streams, tuple(actions or ENDING), seed)
    if plan.every_s >= plan.for_s:
        raise CliError(f"--every ({every}) must be shorter than --for ({for_}), or nothing is done", code=2)
    outcome = Outcome(Tally(streams), Tally(streams))
    try:
        asyncio.run(Chaos(endpoint.grpc_server(url, http_port), plan, outcome).run())
    finally:  # also when it is ended early
        if outcome.harmed.harms:
            report(outcome)
    if faults := outcome.harmed.lost.total() + len(outcome.harmed.changed):
        raise CliError(f"{faults} answers were lost or changed")


class Chaos:
    """One run of it against `server`, counted in `outcome` as it goes."""

    def __init__(self, server: endpoint.Server, plan: Plan, outcome: Outcome) -> None:
        self._server = server
        self._plan = plan
        self._outcome = outcome
        self._rng = random.Random(plan.seed)
        self._clock = time.monotonic
        self._began = 0.0  # when harm was first to be thought of
        self._console = err()
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal)
        self._shown = self._bar.add_task("asking undisturbed", total=plan.for_s)

    async def run(self) -> None:
        """Raises CliError when it cannot begin, and when full strength does not come back."""
        prompts = self._prompts()
        calm, harmed = self._outcome.calm, self._outcome.harmed
        async with self._server.aio_channel() as channel:
            watch = Watch(control_pb2_grpc.ControlServiceStub(channel), self._server)
            whole = await watch.look()
            if not whole.ready:
                raise CliError(f"the deployment is not ready: {whole.reason}")
            ask = asking(inference_pb2_grpc.InferenceServiceStub(channel), self._server)
            ending, hand = asyncio.Event(), Hand()
            with self._bar:
                expected = await undisturbed(prompts, ask, calm, self._clock)
                streams = [
                    asyncio.create_task(keep_asking(i, prompt, expected[i], ask, harmed, ending, self._clock))
                    for i, prompt in enumerate(prompts)
                ]
                try:
                    await self._harm(watch, whole, hand)
                    ending.set()
                    await self._last_answers(streams)
                finally:
                    ending.set()
                    for stream in streams:
                        stream.cancel()
                    await asyncio.gather(*streams, return_exceptions=True)
                    hand.let_go()

    def _prompts(self) -> list[Prompt]:
        with endpoint.control(self._server) as stub:
            limit, metadata = endpoint.LOOK_TIMEOUT_S, self._server.metadata
            model = stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=limit, metadata=metadata)
        return make_prompts(self._plan.streams, model.vocab_size, model.max_context, self._rng)

    async def _harm(self, watch: Watch, whole: Look, hand: Hand) -> None:
        """One harm after the other, until the time is over. Comes back with the deployment at full strength."""
        self._began = self._clock()
        end, due = self._began + self._plan.for_s, self._began + self._plan.every_s
        for action in in_random_order(self._plan.actions, self._rng):
            while (now := self._clock()) < min(due, end):
                self._show(f"before {action}")
                await asyncio.sleep(min(_LOOK_EVERY_S, due - now))
            if now >= end:
                return
            actor = choose(action, (await watch.look()).actors, self._rng)
            harm = Harm(action, actor.name, self._clock())
            self._outcome.harmed.harms.append(harm)
            await hand.do(action, actor)
            await self._until_whole(watch, whole, harm, None if action.signal is None else actor)
            due = max(harm.at + self._plan.every_s, self._clock())

    async def _until_whole(self, watch: Watch, whole: Look, harm: Harm, ended: pb.ActorInfo | None) -> None:
        what = f"{harm.action} {harm.actor}"
        while self._clock() < harm.at + _PATIENCE_S:
            self._show(f"after {what}")
            await asyncio.sleep(_LOOK_EVERY_S)
            with suppress(CliError):  # the controller may be what was harmed
                if is_whole(whole, await watch.look(), ended):
                    after = harm.full_strength_after = self._clock() - harm.at
                    times = f"full strength after {duration(after)}, longest gap {duration(harm.longest_gap)}"
                    self._console.print(f"{harm.at - self._began:7.1f} s  {what}: {times}", soft_wrap=True)
                    return
        raise CliError(f"not at full strength {_PATIENCE_S:g} s after {what}")

    async def _last_answers(self, streams: list[asyncio.Task[None]]) -> None:
        self._show("waiting for the last answers")
        done, hung = await asyncio.wait(streams, timeout=_PATIENCE_S)
        for stream in done:
            stream.result()
        if hung:
            self._outcome.harmed.lost[f"no end within {_PATIENCE_S:g} s"] += len(hung)

    def _show(self, doing: str) -> None:
        self._bar.update(self._shown, description=doing, completed=self._clock() - self._began)


def report(outcome: Outcome) -> None:
    """What came of it: the streams, then the actions, then what went wrong."""
    console = out()
    both = (outcome.calm, outcome.harmed)
    rows = table("", "undisturbed", "harmed")
    rows.add_row("streams", *(str(len(tally.longest_gaps)) for tally in both))
    rows.add_row("answers, whole and the same", *(f"{tally.answers:,}" for tally in both))
    rows.add_row("tokens", *(f"{tally.tokens:,}" for tally in both))
    rows.add_row("lost answers", *(f"{tally.lost.total():,}" for tally in both))
    rows.add_row("changed answers", *(f"{len(tally.changed):,}" for tally in both))
    rows.add_row("median gap between tokens", *(f"{1000 * tally.median_gap:.1f} ms" for tally in both))
    rows.add_row("longest gap of a stream", *(spread(tally.longest_gaps) for tally in both))
    console.print(rows, "")
    rows = table("action", "times", "longest gap", "full strength after")
    for action, harms in outcome.harmed.by_action.items():
        back = [harm.full_strength_after for harm in harms if harm.full_strength_after is not None]
        rows.add_row(action, str(len(harms)), spread([harm.longest_gap for harm in harms]), spread(back))
    console.print(rows)
    reasons = [f"{count} lost: {reason}" for reason, count in outcome.harmed.lost.most_common(_REASONS)]
    for reason in (*reasons, *outcome.harmed.changed[:_REASONS]):
        console.print(reason, markup=False, soft_wrap=True)
