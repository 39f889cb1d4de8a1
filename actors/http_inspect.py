"""Routes that look at the server or its tokenizer: /health, /v1/models, /tokenize, /version, /load, /metrics."""

from __future__ import annotations

from dataclasses import asdict
from typing import Literal, Self

from fastapi import FastAPI
from fastapi.responses import Response
from pydantic import ConfigDict, model_validator

from actors.gateway_core import GatewayCore
from actors.http_answers import Answer, JsonObject
from actors.http_chat_schema import Conversation
from actors.http_formats import RequestBody
from actors.metrics import CONTENT_TYPE
from actors.validation import check_model
from engine.request import RequestRejected


class TokenizeBody(RequestBody, Conversation):
    """POST /tokenize, in vLLM's form: `prompt`, or `messages` with what belongs to them."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None  # not given: to a prompt, but not to what a chat template writes
    add_generation_prompt: Literal[True] = True
    continue_final_message: Literal[False] = False
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.prompt is None) == ("messages" not in self.model_fields_set):
            raise RequestRejected("the body must have either prompt or messages", field="prompt")
        if self.prompt is None and self.add_special_tokens:
            raise RequestRejected(
                "add_special_tokens is for a prompt: a chat template writes its own", field="add_special_tokens"
            )
        return self


class DetokenizeBody(RequestBody):
    """POST /detokenize, in vLLM's form."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    model: str | None = None
    tokens: list[int]


def add_inspection(app: FastAPI, core: GatewayCore) -> None:
    """The routes that look at things."""

    @app.get("/health")
    async def health() -> Response:
        return Answer({"status": "alive"})

    @app.get("/health/ready")
    async def ready() -> Response:
        try:
            status = await core.status()
        except RequestRejected as error:
            return Answer({"status": "not ready", "reason": str(error)}, 503)
        if not status.ready:
            return Answer({"status": "not ready", "reason": status.reason}, 503)
        return Answer({"status": "ready"})

    @app.get("/version")
    async def version() -> Response:
        return Answer({"version": core.version})

    @app.get("/load")
    async def load() -> Response:
        """`server_load`, as in vLLM: answers under way through this gateway. `engines`: each one's own, from all.

        `epoch`, `failovers` and `balance` are as in ControlService's GetServerInfo and GetExpertPlacement.
        """
        status = await core.status()
        return Answer(
            {
                "server_load": core.metrics.under_way,
                "engines": {name: asdict(load) for name, load in sorted(status.engines.items())},
                "epoch": status.epoch,
                "failovers": status.failovers,
                "balance": {
                    "mode": status.balance_mode,
                    "balancedness": status.balancedness,
                    "balancedness_before": status.balancedness_before,
                    "seconds_since_move": status.seconds_since_move,
                },
            }
        )

    @app.get("/metrics")
    async def metrics() -> Response:
        """This gateway's requests and all engines' load. Without the controller, the former only."""
        try:
            status = await core.status()
        except RequestRejected:
            status = None
        return Response(core.metrics.text(status), headers={"Content-Type": CONTENT_TYPE})

    @app.get("/v1/models")
    async def models() -> Response:
        return Answer({"object": "list", "data": [_model_card(core)]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        check_model(core.model, name)
        return Answer(_model_card(core))

    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> Response:
        check_model(core.model, body.model)
        if body.prompt is None:
            token_ids = (await core.encode_chat(body.conversation(), body.tool_use())).token_ids
        else:
            token_ids = await core.encode(body.prompt, body.add_special_tokens is not False)
        answer: JsonObject = {"count": len(token_ids), "max_model_len": core.model.max_context, "tokens": token_ids}
        answer["token_strs"] = [core.token_text(token_id) for token_id in token_ids] if body.return_token_strs else None
        return Answer(answer)

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> Response:
        check_model(core.model, body.model)
        return Answer({"prompt": core.decode(body.tokens, "tokens")})


def _model_card(core: GatewayCore) -> JsonObject:
    model = core.model
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "herder",
        "max_model_len": model.max_context,
    }
