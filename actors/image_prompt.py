"""Conversations with images, as prompts: where the images' tokens go, and what they show."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from actors.image_fetch import ImageFetcher
from actors.image_pace import ImagePace
from cluster.config import VisionConfig
from engine.image_spec import ImageSpec
from engine.images import ImageError, ImageLimits, choose_grid, image_digest, image_tokens, inspect_image
from engine.request import ErrorCode, PromptImage, RequestRejected


@dataclass(frozen=True, slots=True)
class ImagePart:
    """A part of a message: the bytes of a file, or its URL."""

    source: bytes | str


Content = Sequence[str | ImagePart]


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, as chat templates take it, and the images of its parts of type "image", in order."""

    messages: Sequence[Mapping[str, object]]
    images: Sequence[ImagePart] = ()


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, and the images among them: their places, and the encoded files, one for one."""

    token_ids: Sequence[int]
    places: tuple[PromptImage, ...] = ()
    images: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class _Picture:
    """An image's file, and the tokens that stand for it in a prompt."""

    data: bytes
    digest: bytes
    token_ids: Sequence[int]


def template_content(role: str, content: Content) -> str | list[dict[str, str]]:
    """A message's content as chat templates take it: one text, or with images a list of parts.

    Raises RequestRejected for images that are not the user's.
    """
    if not any(isinstance(part, ImagePart) for part in content):
        return "".join(part for part in content if isinstance(part, str))
    if role != "user":
        raise _rejected(f"messages: only the user shows images, not {role}")
    parts: list[dict[str, str]] = []
    for part in content:
        if isinstance(part, ImagePart):
            parts.append({"type": "image"})
        elif parts and parts[-1]["type"] == "text":
            parts[-1]["text"] += part
        else:
            parts.append({"type": "text", "text": part})
    return parts


class ImagePrompts:
    """Prompts with images, for one model."""

    def __init__(self, spec: ImageSpec, config: VisionConfig, fetcher: ImageFetcher) -> None:
        self._spec = spec
        self._limits = ImageLimits(config.max_image_bytes, config.max_image_pixels)
        self._max_images = config.max_images
        self._fetcher = fetcher
        self.pace = ImagePace(config.max_stream_slowdown)

    @property
    def place(self) -> int:
        """The token that a chat template writes where an image is."""
        return self._spec.image_token_id

    @property
    def reserved(self) -> Collection[int]:
        """The tokens that only images consist of."""
        return self._spec.token_ids

    async def fill(
        self, pieces: Sequence[Sequence[int]], images: Sequence[ImagePart], deadline: float | None
    ) -> Prompt:
        """A conversation's prompt, of the tokens between its images.

        Waits for its turn. `deadline`, in Unix seconds: when to give up waiting and fetching. Raises RequestRejected,
        naming "messages", for images that cannot be had or are none.
        """
        if len(images) > self._max_images:
            raise _rejected(f"messages may have at most {self._max_images} images, not {len(images)}")
        if len(pieces) != len(images) + 1:
            raise _rejected(f"messages: the chat template has places for {len(pieces) - 1} of {len(images)} images")
        try:
            async with (
                asyncio.timeout(None if deadline is None else deadline - time.time()),
                asyncio.TaskGroup() as group,
            ):
                if images:
                    await self.pace.turn()
                tasks = [group.create_task(self._load(number, image)) for number, image in enumerate(images, 1)]
        except TimeoutError:
            raise RequestRejected("the request's deadline has passed", code=ErrorCode.DEADLINE_EXCEEDED) from None
        except BaseExceptionGroup as failures:  # the others are cancelled
            raise failures.exceptions[0] from None
        return _join(pieces, [task.result() for task in tasks])

    async def _load(self, number: int, image: ImagePart) -> _Picture:
        source = image.source
        try:
            data = source if isinstance(source, bytes) else await self._fetcher.fetch(source)
            return await asyncio.to_thread(self._look_at, data)
        except ImageError as error:
            raise _rejected(f"messages: image {number}: {error}") from None

    def _look_at(self, data: bytes) -> _Picture:
        head = inspect_image(data, self._limits)
        tokens = image_tokens(choose_grid(head.width, head.height, self._spec), self._spec)
        return _Picture(data, image_digest(data, self._spec), tokens)


def _join(pieces: Sequence[Sequence[int]], pictures: Sequence[_Picture]) -> Prompt:
    """All pieces of text, with a picture between each two."""
    token_ids = list(pieces[0])
    places = []
    for picture, piece in zip(pictures, pieces[1:], strict=True):
        places.append(PromptImage(len(token_ids), len(picture.token_ids), picture.digest))
        token_ids += [*picture.token_ids, *piece]
    return Prompt(token_ids, tuple(places), tuple(picture.data for picture in pictures))


def _rejected(problem: str) -> RequestRejected:
    return RequestRejected(problem, field="messages")
