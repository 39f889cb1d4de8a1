"""The gateway's way to the image encoder: what each image of a request has become, whatever happens to a replica."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence

from ray import ObjectRef
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from actors.encoded_images import EncodedImage, EncodedImages
from actors.reasons import first_line
from engine.request import ErrorCode, RequestRejected

log = logging.getLogger("herder")

_MOST_ATTEMPTS = 5  # an image may be what its replicas die of
_FIRST_PAUSE_S = 0.1

Encode = Callable[[bytes, bytes, str | None], Awaitable[EncodedImage | RequestRejected]]


class VisionClient:
    """Remembers what the encoder has answered, and asks once for what several requests want at once.

    Args:
        encode: asks the encoder for a file with a digest, as part of the span that a `traceparent` (W3C) names, if any;
            raises RayError or RayServeException when a replica fails.
        cache_bytes: of embeddings that are kept in the object store for images that come again.
        timeout_s: so long images wait for a replica, which may have to start first.
    """

    def __init__(self, encode: Encode, cache_bytes: int, timeout_s: float) -> None:
        self._encode = encode
        self._timeout_s = timeout_s
        self._known = EncodedImages(cache_bytes)
        self._under_way: dict[bytes, asyncio.Task[EncodedImage]] = {}

    @classmethod
    def of(cls, deployment: DeploymentHandle, cache_bytes: int, timeout_s: float) -> VisionClient:
        """The client of a deployment of `actors.vision.Vision`."""

        async def encode(digest: bytes, data: bytes, traceparent: str | None) -> EncodedImage | RequestRejected:
            # The router chooses by the session: the same image, the same replica.
            answer: EncodedImage | RequestRejected = await deployment.options(session_id=digest.hex()).encode.remote(
                digest, data, traceparent
            )
            return answer

        return cls(encode, cache_bytes, timeout_s)

    async def embeddings(
        self, digests: Sequence[bytes], files: Sequence[bytes], traceparent: str | None = None
    ) -> list[ObjectRef]:
        """Where the embeddings of these images are, one for one. `traceparent`: of the span that wants them.

        Raises RequestRejected: INVALID_ARGUMENT, field `messages`, when one cannot be read; UNAVAILABLE when there is
        no replica in time, or all that were asked failed.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                pairs = zip(digests, files, strict=True)
                images = await asyncio.gather(*(self._image(digest, data, traceparent) for digest, data in pairs))
        except TimeoutError:
            message = f"no replica of the image encoder has answered for {self._timeout_s:g} s"
            raise RequestRejected(message, code=ErrorCode.UNAVAILABLE) from None
        return [image.ref for image in images]

    def forget(self, digests: Iterable[bytes]) -> None:
        """The embeddings of one of these are lost: all are asked for anew when they are wanted again."""
        for digest in digests:
            self._known.forget(digest)

    async def _image(self, digest: bytes, data: bytes, traceparent: str | None) -> EncodedImage:
        if (known := self._known.get(digest)) is not None:
            return known
        if (task := self._under_way.get(digest)) is None:
            # In a context of its own: Serve ends calls with the request in whose context they began, and mixes two of
            # the same request where they are routed by session. This one is for whoever wants the image.
            task = asyncio.create_task(self._ask(digest, data, traceparent), context=contextvars.Context())
            self._under_way[digest] = task
            task.add_done_callback(lambda ended: self._take(digest, ended))
        return await asyncio.shield(task)  # others may wait for the same

    def _take(self, digest: bytes, ended: asyncio.Task[EncodedImage]) -> None:
        del self._under_way[digest]
        if not ended.cancelled() and ended.exception() is None:
            self._known.put(digest, ended.result())

    async def _ask(self, digest: bytes, data: bytes, traceparent: str | None) -> EncodedImage:
        pause = _FIRST_PAUSE_S
        for attempt in range(1, _MOST_ATTEMPTS + 1):
            try:
                answer = await self._encode(digest, data, traceparent)
            except (RayError, RayServeException) as error:
                log.warning(
                    "image not encoded digest=%s attempt=%d reason=%s", digest.hex(), attempt, first_line(error)
                )
                await asyncio.sleep(pause)
                pause *= 2
                continue
            if isinstance(answer, RequestRejected):
                raise answer
            return answer
        raise RequestRejected("the image encoder failed; try again later", code=ErrorCode.UNAVAILABLE)
