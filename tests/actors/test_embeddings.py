"""Embeddings on their way through the object store."""

from __future__ import annotations

import warnings

import pytest
import torch

from actors.embeddings import to_array, to_tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_they_come_back_as_they_were_without_a_copy(dtype):
    embeddings = torch.randn((6, 4), generator=torch.Generator().manual_seed(0)).to(dtype)[::2]
    array = to_array(embeddings)
    array.flags.writeable = False  # as arrays from the object store are
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = to_tensor(array)
    assert back.dtype is dtype and torch.equal(back, embeddings)
    assert back.data_ptr() == array.ctypes.data
