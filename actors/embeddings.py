"""Embeddings of images as they lie in Ray's object store.

Shapes: P patch tokens of an image, D the text model's width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_array(embeddings_PD: Tensor) -> NDArray[Any]:
    """The same in main memory, for the object store. NumPy has no bfloat16: its bits travel as unsigned integers."""
    embeddings_PD = embeddings_PD.cpu().contiguous()
    if embeddings_PD.dtype is torch.bfloat16:
        embeddings_PD = embeddings_PD.view(torch.uint16)
    array: NDArray[Any] = embeddings_PD.numpy()
    return array


def to_tensor(array_PD: NDArray[Any]) -> Tensor:
    """What `to_array` was given; shares the array's memory, which may be read-only."""
    embeddings_PD = torch.from_dlpack(array_PD)  # from_numpy warns of read-only memory
    return embeddings_PD.view(torch.bfloat16) if array_PD.dtype == np.uint16 else embeddings_PD
