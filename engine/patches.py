"""What the patch tokens of a prompt's images enter the first layer as: rows that the image encoder has made.

Shapes: P patch tokens of an image, D model width.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from engine.request import Request, RequestRejected


class PromptPatches:
    """All patch tokens of one request's images. Kept until it ends: one that is preempted computes its prompt again."""

    def __init__(self, request: Request, embeddings_PD: Sequence[Tensor], patch_token_id: int) -> None:
        """`embeddings_PD`: of each image of the request, a row for each of its patch tokens, in order.

        Raises RequestRejected when the rows are not as many as the tokens.
        """
        if len(embeddings_PD) != len(request.images):
            raise _refusal(f"{len(request.images)} images have embeddings for {len(embeddings_PD)}")
        self._positions: list[int] = []
        self._embeddings_PD = embeddings_PD
        self._starts = [0]  # of each image among the patch tokens; and their number
        for number, (image, rows_PD) in enumerate(zip(request.images, embeddings_PD, strict=True), 1):
            places = range(image.start, image.stop)
            patches = [place for place in places if request.prompt_token_ids[place] == patch_token_id]
            if len(patches) != len(rows_PD):
                raise _refusal(f"image {number} has {len(patches)} patch tokens and {len(rows_PD)} embeddings")
            self._positions += patches
            self._starts.append(len(self._positions))

    def between(self, first: int, stop: int) -> tuple[list[int], list[Tensor]]:
        """The patch tokens' positions in first..stop, and the embeddings [_, D] of these, in one or more pieces."""
        low, high = bisect_left(self._positions, first), bisect_left(self._positions, stop)
        pieces = [
            rows_PD[max(low, begin) - begin : high - begin]
            for rows_PD, (begin, end) in zip(self._embeddings_PD, pairwise(self._starts), strict=True)
            if begin < high and end > low
        ]
        return self._positions[low:high], pieces


def _refusal(problem: str) -> RequestRejected:
    return RequestRejected(f"the images do not fit their places in the prompt: {problem}", field="messages")
