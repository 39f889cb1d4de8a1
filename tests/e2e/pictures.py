"""Images for a live deployment, and what its image encoders say and do."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import httpx
import numpy as np
import psutil
import ray
from ray import serve

from bench.burst import noise

VISION = "ray::ServeReplica:herder:vision"  # what Ray calls an image encoder's process


@dataclass(frozen=True)
class Reply:
    """`scores`: the tokens' log-probabilities, which tell more than the text where a model says little.

    `cached`: tokens of the prompt that the prefix cache had.
    """

    text: str
    scores: tuple[float, ...]
    prompt: int
    cached: int

    def is_like(self, other: Reply) -> bool:
        """Whether it says the same; batches of other shapes round otherwise."""
        same = len(self.scores) == len(other.scores) and np.allclose(self.scores, other.scores, atol=2e-3)
        return same and self.text == other.text


def png(seed: int, side: int = 224) -> bytes:
    """Noise of 16 tiles in the bundled model's eyes, if the side is at least 224."""
    return noise(side, seed)


async def ask(client: httpx.AsyncClient, images: Sequence[bytes], max_tokens: int = 8) -> Reply:
    """Shows images and asks; the answer is greedy and has `max_tokens`."""
    urls = [f"data:image/png;base64,{base64.b64encode(image).decode()}" for image in images]
    content = [
        *({"type": "image_url", "image_url": {"url": url}} for url in urls),
        {"type": "text", "text": "What is it?"},
    ]
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "logprobs": True,
    }
    response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    usage, choice = answer["usage"], answer["choices"][0]
    scores = tuple(entry["logprob"] for entry in choice["logprobs"]["content"])
    return Reply(
        choice["message"]["content"], scores, usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]
    )


def encoders() -> list[psutil.Process]:
    """The processes of the image encoders that live, in a Ray that this process has started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.cmdline() and process.cmdline()[0].startswith(VISION):
                found.append(process)
    return found


def running_encoders() -> int:
    """How many Serve counts as running."""
    return serve.status().applications["herder"].deployments["vision"].replica_states.get("RUNNING", 0)


def images_encoded() -> float:
    """By all replicas that have ever been, as Ray's metrics tell; they are seconds behind."""
    total = 0.0
    for node in ray.nodes():
        text = httpx.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics").text
        total += sum(map(float, re.findall(r"^ray_herder_vision_images_total\{.*\} (\S+)$", text, re.MULTILINE)))
    return total
