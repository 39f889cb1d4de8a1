"""Pictures, and conversations that show them, as each of the two interfaces takes them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

from PIL import Image

from herder.v1 import inference_pb2 as pb

Part = str | bytes | pb.MediaItem  # text, or an image (MediaItem: over gRPC only)
Turn = tuple[str, Sequence[Part]]  # role, content


def picture(width: int = 8, height: int = 8, color: str = "red") -> bytes:
    """A PNG file."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), color).save(file, "PNG")
    return file.getvalue()


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


RED, BLUE, WIDE = picture(), picture(color="blue"), picture(16, 8)


def over_http(turns: Sequence[Turn], **image: object) -> list[dict[str, object]]:
    """Messages in OpenAI's form; `image` are more fields of each image_url."""

    def part(part: Part) -> dict[str, object]:
        if isinstance(part, str):
            return {"type": "text", "text": part}
        assert isinstance(part, bytes)
        return {"type": "image_url", "image_url": {"url": data_url(part), **image}}

    return [{"role": role, "content": [part(p) for p in content]} for role, content in turns]


def over_grpc(turns: Sequence[Turn]) -> list[pb.ChatMessage]:
    def part(part: Part) -> pb.ContentPart:
        if isinstance(part, str):
            return pb.ContentPart(text=part)
        return pb.ContentPart(image=pb.MediaItem(data=part) if isinstance(part, bytes) else part)

    return [pb.ChatMessage(role=role, content=[part(p) for p in content]) for role, content in turns]


def asking(*content: Part) -> pb.ChatRequest:
    """One message of the user's."""
    return pb.ChatRequest(messages=over_grpc([("user", content)]))
