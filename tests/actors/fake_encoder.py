"""An image encoder that answers by a script, as far as its client uses it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from actors.encoded_images import EncodedImage
from engine.request import RequestRejected


class FakeEncoder:
    """`asked`: the digests, in order. Each answer waits for `open`; those in `failures` come before all others."""

    def __init__(self, nbytes: int = 10) -> None:
        self.asked: list[bytes] = []
        self.traceparents: list[str | None] = []
        self.open = asyncio.Event()
        self.open.set()
        self.unreadable: set[bytes] = set()  # files
        self._nbytes = nbytes
        self._failures: Iterator[Exception] = iter(())

    def fail(self, *errors: Exception) -> None:
        """The next calls end like this."""
        self._failures = iter(errors)

    async def __call__(self, digest: bytes, data: bytes, traceparent: str | None) -> EncodedImage | RequestRejected:
        self.asked.append(digest)
        self.traceparents.append(traceparent)
        name = f"{digest.decode()}#{len(self.asked)}"
        await self.open.wait()
        if (error := next(self._failures, None)) is not None:
            raise error
        if data in self.unreadable:
            return RequestRejected("the image is broken", field="messages")
        return EncodedImage(name, self._nbytes)  # type: ignore[arg-type]
