"""Images that a URL holds itself."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.image_fetch import read_data_url
from engine.images import ImageError


@given(st.binary(max_size=40), st.sampled_from(["image/png", "IMAGE/x", "application/octet-stream", "image/png;a=b"]))
def test_data_urls(data: bytes, kind: str) -> None:
    text = base64.b64encode(data).decode()
    for scheme in ("data", "DATA"):
        assert read_data_url(f"{scheme}:{kind};base64,{text}") == data


@given(st.binary(min_size=1, max_size=40), st.sampled_from(" \n\t-_%,é\u0661"), st.data())
def test_base64_is_strict(data: bytes, stray: str, at: st.DataObject) -> None:
    text = base64.b64encode(data).decode()
    index = at.draw(st.integers(0, len(text.rstrip("="))))
    broken = f"{text[:index]}{stray}{text[index:]}"
    with pytest.raises(ImageError, match="holds no valid base64"):
        read_data_url(f"data:image/png;base64,{broken}")


@given(st.text(max_size=20) | st.from_regex(r"(image/png)?(;[a-z=]{0,8}){0,2},?[A-Za-z0-9+/=]{0,8}", fullmatch=True))
def test_any_data_url_is_bytes_or_an_error(rest: str) -> None:
    try:
        found = read_data_url(f"data:{rest}")
    except ImageError:
        return
    kind, _, data = rest.partition(",")
    assert kind.lower().endswith(";base64") and base64.b64decode(data) == found


@pytest.mark.parametrize(
    "url", ["data:,", "data:image/png,x", "data:text/plain;base64,aGk=", "data:;base64,aGk=", "data:"]
)
def test_data_urls_that_are_no_images(url: str) -> None:
    with pytest.raises(ImageError, match="must begin with data:image/TYPE;base64,"):
        read_data_url(url)
