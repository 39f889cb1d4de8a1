"""A request under way in a gateway."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

from ray import ObjectRef

from actors.engine_links import EngineLink
from engine.request import Request, RequestOutput, RequestRejected


@dataclass(slots=True)
class OpenRequest:
    """Its journal, the link that it is at, and what has come through that.

    The journal is the request, its images' files, and the `tokens` that its client has. `embeddings`: where the image
    encoder has put what it made of the images. `left`: links that it does not go back to. `fruitless`: how many engines
    in a row were lost before they gave a token. `moving`: it is at no engine, because its images are being encoded or
    because its engine is lost.
    """

    request: Request
    images: tuple[bytes, ...] = ()
    tokens: list[int] = field(default_factory=list)
    embeddings: list[ObjectRef] = field(default_factory=list)
    link: EngineLink | None = None
    outputs: asyncio.Queue[RequestOutput] = field(default_factory=asyncio.Queue)
    submission: asyncio.Future[RequestRejected | None] | None = None
    left: set[EngineLink] = field(default_factory=set)
    tokens_before: int = 0
    fruitless: int = 0
    moving: bool = False
    aborted: bool = False

    @property
    def digests(self) -> list[bytes]:
        """Of its images."""
        return [image.digest for image in self.request.images]

    def rest(self) -> Request:
        """The request, as an engine gets it that is to go on with it."""
        return replace(self.request, generated_token_ids=(*self.request.generated_token_ids, *self.tokens))
