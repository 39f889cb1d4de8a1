"""Images from URLs: what is fetched, and above all what is not."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from actors.image_fetch import ImageFetcher
from cluster.config import VisionConfig
from engine.images import ImageError
from tests.certificates import Authority

PUBLIC = "93.184.215.14"
NOT_PUBLIC = "leads to an address that is not public"

# ---- Fetching: refusals before any connection


class NoConnection(httpx.AsyncBaseTransport):
    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        raise AssertionError(f"connected to {request.url}")


def fetcher(
    *hosts: str,
    resolve: Callable[[str], Awaitable[Sequence[str]]] | None = None,
    transport: httpx.AsyncBaseTransport | None = None,
    **more: object,
) -> ImageFetcher:
    config = VisionConfig.model_validate({"allow_urls": True, "url_hosts": hosts, "max_image_bytes": 1000, **more})
    return ImageFetcher(config, resolve, transport)


async def refused(found: ImageFetcher, url: str) -> str:
    with pytest.raises(ImageError) as caught:
        await found.fetch(url)
    return str(caught.value)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "2130706433", "0x7f000001", "017700000001", "127.1", "0x7f.1", "0", "0.0.0.0", "localhost",
        "LOCALHOST.", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "224.0.0.1",
        "255.255.255.255", "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::127.0.0.1]",
        "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "[fe80::1]", "[fd00::1]", "[ff02::1]",
    ],
)  # fmt: skip
async def test_the_inside_by_any_name(host: str) -> None:
    """As the operating system itself reads these."""
    for url in (f"http://{host}/a.png", f"https://{host}:80/a.png"):
        assert await refused(fetcher(transport=NoConnection()), url) == f"{url} {NOT_PUBLIC}"


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("file:///etc/passwd", "its url must be a data:, http: or https: URL"),
        ("ftp://a/b.png", "its url must be a data:, http: or https: URL"),
        ("gopher://127.0.0.1:6379/_x", "its url must be a data:, http: or https: URL"),
        ("//a/b.png", "its url must be a data:, http: or https: URL"),
        ("b.png", "its url must be a data:, http: or https: URL"),
        ("", "its url must be a data:, http: or https: URL"),
        ("http://", "http:// names no host"),
        ("http:///b.png", "http:///b.png names no host"),
        ("http://a b/", "http://a b/ is of a host that cannot be found"),
        ("http://a\n/", "http://a\n/ is no URL"),
        ("http://[::1/", "http://[::1/ is no URL"),
        ("http://0177.0.0.1/", "http://0177.0.0.1/ is no URL"),
        ("http://me:secret@a/", "http://me:secret@a/ has a user name or a password, which are not sent"),
        ("http://a:8265/", "http://a:8265/ is of a port that this server fetches no images from"),
        ("http://" + "a" * 300, "http://" + "a" * 90 + "... is of a host that cannot be found"),
    ],
)
async def test_urls_that_are_not_looked_at(url: str, sentence: str) -> None:
    assert await refused(fetcher(transport=NoConnection()), url) == sentence


async def test_urls_are_off_by_default() -> None:
    found = ImageFetcher(VisionConfig(), transport=NoConnection())
    assert await refused(found, "https://example.org/a.png") == "this server fetches no images; send them as data: URLs"
    assert await found.fetch("data:image/png;base64,aGk=") == b"hi"


async def test_a_host_with_one_inner_address_is_refused() -> None:
    async def resolve(_: str) -> Sequence[str]:
        return [PUBLIC, "127.0.0.1"]

    assert NOT_PUBLIC in await refused(fetcher(resolve=resolve, transport=NoConnection()), "http://a/")


async def test_the_connection_goes_to_the_address_that_was_checked() -> None:
    """A name server that answers otherwise the second time is not asked a second time."""
    answers = iter([[PUBLIC], ["127.0.0.1"]])
    seen: list[httpx.Request] = []

    async def resolve(_: str) -> Sequence[str]:
        return next(answers)

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, headers={"content-type": "image/png"}, stream=httpx.ByteStream(b"png"))

    found = fetcher(resolve=resolve, transport=httpx.MockTransport(answer))
    assert await found.fetch("https://Rebind.example:443/a.png?x=1#part") == b"png"
    (request,) = seen
    assert str(request.url) == f"https://{PUBLIC}/a.png?x=1"
    assert request.headers["host"] == "rebind.example"
    assert request.extensions["sni_hostname"] == "rebind.example"
    assert NOT_PUBLIC in await refused(found, "https://rebind.example/a.png")


# ---- Fetching: a server on this machine, which the list names with its port

Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


class Site:
    """Raw answers by path; a path that it does not know gives its own image. Keeps the requests' heads."""

    def __init__(self) -> None:
        self.answers: dict[str, bytes | Answer] = {}
        self.heads: list[str] = []
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.heads.append(head)
            found = self.answers.get(head.split()[1], page(b"an image"))
            if isinstance(found, bytes):
                writer.write(found)
                await writer.drain()
            else:
                await found(writer)
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def fetch(self, path: str, **more: object) -> bytes:
        return await self.fetcher(**more).fetch(self.url(path))

    async def refused(self, path: str, **more: object) -> str:
        url = self.url(path)
        sentence = await refused(self.fetcher(**more), url)
        assert sentence.startswith(url)
        return sentence.removeprefix(f"{url} ")

    def url(self, path: str, host: str = "store.test") -> str:
        return f"http://{host}:{self.port}{path}"

    def fetcher(self, **more: object) -> ImageFetcher:
        """`inner.test` is here as well, but not listed with its port."""

        async def resolve(host: str) -> Sequence[str]:
            return {"store.test": ["127.0.0.1"], "inner.test": ["127.0.0.1"], "two.test": ["127.0.0.2", "127.0.0.1"]}[
                host
            ]

        return fetcher(f"store.test:{self.port}", f"two.test:{self.port}", "inner.test", resolve=resolve, **more)


def page(content: bytes, kind: str = "image/png", status: str = "200 OK", more: str = "") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(content)}\r\n{more}\r\n"
    return head.encode() + content


def redirect(to: str, status: int = 302) -> bytes:
    return page(b"", status=f"{status} Found", more=f"Location: {to}\r\nSet-Cookie: a=b\r\n")


@asynccontextmanager
async def running(site: Site, tls: ssl.SSLContext | None = None) -> AsyncIterator[None]:
    server = await asyncio.start_server(site.serve, "127.0.0.1", 0, ssl=tls)
    site.port = server.sockets[0].getsockname()[1]
    async with server:
        yield


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    found = Site()
    async with running(found):
        yield found


async def test_a_listed_store(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    assert await site.fetch("/a.png") == b"an image"
    head = site.heads[0].lower()
    assert f"\r\nhost: store.test:{site.port}\r\n" in head
    assert "authorization" not in head and "cookie" not in head


async def test_the_next_address_when_the_first_does_not_answer(site: Site) -> None:
    assert await site.fetcher().fetch(site.url("/a.png", "two.test")) == b"an image"


async def test_redirects_up_to_three(site: Site) -> None:
    for step, status in enumerate((301, 302, 307, 308)):
        site.answers[f"/{step}"] = redirect(f"/{step + 1}", status)
    assert await site.fetch("/1") == b"an image"
    assert all("cookie" not in head.lower() for head in site.heads)
    assert await site.refused("/0") == "redirects more than 3 times"


@pytest.mark.parametrize(
    ("location", "sentence"),
    [
        ("http://inner.test/a.png", NOT_PUBLIC),
        ("//inner.test/a.png", NOT_PUBLIC),
        ("http://127.0.0.1:{port}/a.png", "is of a host that this server fetches no images from"),
        ("http://inner.test:{port}/a.png", "is of a port that this server fetches no images from"),
        ("http://me@store.test:{port}/a.png", "has a user name or a password, which are not sent"),
        ("file:///etc/passwd", "redirects to something that is no http: or https: URL"),
        ("http://[::1/", "is no URL"),
    ],
)
async def test_redirects_are_checked_like_the_first_url(location: str, sentence: str, site: Site) -> None:
    site.answers["/"] = redirect(location.replace("{port}", str(site.port)))
    assert await site.refused("/") == sentence
    assert len(site.heads) == 1


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (page(b"", status="404 Not Found"), "cannot be fetched: the answer was 404"),
        (page(b"", status="304 Not Modified"), "cannot be fetched: the answer was 304"),
        (page(b"<html>", "text/html; charset=utf-8"), "is no image but of type 'text/html; charset=utf-8'"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx", "is no image but of type ''"),
        (page(b"x", more="Content-Encoding: gzip\r\n"), "came compressed, which was not asked for"),
        (page(b"x" * 1001), "has more than 1000 bytes"),
        (page(b"x")[:-1], "cannot be fetched: the connection failed"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "cannot be fetched: the connection failed"),
        (b"", "cannot be fetched: the connection failed"),
    ],
)
async def test_answers_that_are_no_image(answer: bytes, sentence: str, site: Site) -> None:
    site.answers["/"] = answer
    assert await site.refused("/") == sentence


async def test_an_endless_image_is_cut_off(site: Site) -> None:
    closed = asyncio.Event()

    async def endless(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\n")
        try:
            while True:
                writer.write(b"x" * 500)
                await writer.drain()
        finally:
            closed.set()

    site.answers["/"] = endless
    assert await site.refused("/") == "has more than 1000 bytes"
    await asyncio.wait_for(closed.wait(), 10)


async def test_a_slow_server_and_a_slow_name_server(site: Site) -> None:
    async def drip(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\n")
        while True:  # each byte comes in time, the image never does
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.02)

    async def resolve(_: str) -> Sequence[str]:
        await asyncio.sleep(60)
        return [PUBLIC]

    site.answers["/"] = drip
    assert await site.refused("/", url_timeout_s=0.2) == "did not arrive within 0.2 s"
    slow = fetcher(resolve=resolve, transport=NoConnection(), url_timeout_s=0.05)
    assert await refused(slow, "http://a/") == "http://a/ did not arrive within 0.05 s"


async def test_certificates_are_checked_for_the_name_and_not_the_address(tmp_path: Path) -> None:
    authority, site = Authority(tmp_path, "authority"), Site()
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(*authority.issue("store"))
    asked_for: list[str | None] = []
    server.sni_callback = lambda _, name, __: asked_for.append(name)
    trust = ssl.create_default_context(cafile=str(authority.cert))
    async with running(site, server):
        found = site.fetcher(transport=httpx.AsyncHTTPTransport(verify=trust))
        assert await found.fetch(site.url("/a.png").replace("http:", "https:")) == b"an image"
        other = site.url("/a.png", "two.test").replace("http:", "https:")
        assert await refused(found, other) == f"{other} cannot be fetched: the connection failed"
    assert asked_for[:2] == ["store.test", "two.test"]
