"""An image's bytes, from its URL.

A client must not reach through the server what it cannot reach by itself. So each host is looked up once, all of its
addresses are checked, and the connection goes to one of those very addresses: there is no second look-up that could
answer otherwise. Redirects are new URLs, checked like the first. Requests go straight to the transport: they carry no
cookies and no credentials, and know no proxies of the environment.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import socket
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from ipaddress import ip_address

import httpx

from actors.image_hosts import HostRules, UrlRefused, host_of, is_public
from cluster.config import VisionConfig
from engine.images import ImageError

Resolver = Callable[[str], Awaitable[Sequence[str]]]
MAX_REDIRECTS = 3
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_CONNECT_TIMEOUT_S = 3.0
_HEADERS = {
    "User-Agent": "herder",
    "Accept": "image/*",
    "Accept-Encoding": "identity",
    # The transport knows connections by address. None may be used again: its certificate was checked for one host.
    "Connection": "close",
}


class SystemResolver:
    """The addresses of a host, as the operating system finds them. Raises OSError when there are none.

    In threads of its own: slow name servers must not take those in which prompts are tokenised.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="resolver")

    async def __call__(self, host: str) -> Sequence[str]:
        look_up = functools.partial(socket.getaddrinfo, host, None, type=socket.SOCK_STREAM)
        found = await asyncio.get_running_loop().run_in_executor(self._threads, look_up)
        return [str(address[0]) for *_, address in found]


class ImageFetcher:
    """Fetches images for clients. Every failure is an ImageError."""

    def __init__(
        self,
        config: VisionConfig,
        resolve: Resolver | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """Raises ConfigError for hosts in `config` that are none."""
        self._config = config
        self._rules = HostRules.parse(config.url_hosts)
        self._resolve = resolve or SystemResolver()
        self._transport = transport or httpx.AsyncHTTPTransport()

    async def fetch(self, url: str) -> bytes:
        """What a data:, http: or https: URL holds."""
        scheme = url.partition(":")[0].lower()
        if scheme == "data":
            return await asyncio.to_thread(read_data_url, url)
        if scheme not in ("http", "https"):
            raise ImageError("its url must be a data:, http: or https: URL")
        if not self._config.allow_urls:
            raise ImageError("this server fetches no images; send them as data: URLs")
        try:
            async with asyncio.timeout(self._config.url_timeout_s):
                return await self._follow(url)
        except TimeoutError:
            problem = f"did not arrive within {self._config.url_timeout_s:g} s"
        except UrlRefused as error:
            problem = str(error)
        except httpx.InvalidURL:
            problem = "is no URL"
        except httpx.HTTPError:
            problem = "cannot be fetched: the connection failed"
        raise ImageError(f"{url if len(url) <= 100 else url[:97] + '...'} {problem}")

    async def _follow(self, start: str) -> bytes:
        url = httpx.URL(start)
        for _ in range(MAX_REDIRECTS + 1):
            addresses = await self._addresses(url)
            async with aclosing(await self._request(url, addresses)) as response:
                if response.status_code not in _REDIRECTS:
                    return await self._image(response)
                url = url.join(response.headers.get("location", ""))
            if url.scheme not in ("http", "https"):
                raise UrlRefused("redirects to something that is no http: or https: URL")
        raise UrlRefused(f"redirects more than {MAX_REDIRECTS} times")

    async def _addresses(self, url: httpx.URL) -> Sequence[str]:
        """Those that `url` may be fetched from. Raises UrlRefused when it has only one that it must not lead to."""
        private = self._rules.check(url)
        try:
            found = await self._resolve(host_of(url))
        except (OSError, UnicodeError):
            raise UrlRefused("is of a host that cannot be found") from None
        if not private and not all(is_public(ip_address(address)) for address in found):
            raise UrlRefused("leads to an address that is not public")
        return list(dict.fromkeys(found))

    async def _request(self, url: httpx.URL, addresses: Sequence[str]) -> httpx.Response:
        """The response of the first address that can be reached. Close it."""
        timeout = httpx.Timeout(self._config.url_timeout_s, connect=_CONNECT_TIMEOUT_S)
        extensions = {"sni_hostname": host_of(url), "timeout": timeout.as_dict()}
        headers = {"Host": url.netloc.decode("ascii"), **_HEADERS}
        failure: httpx.TransportError = httpx.ConnectError("no address")
        for address in addresses:
            there = url.copy_with(host=address, fragment=None)
            request = httpx.Request("GET", there, headers=headers, extensions=extensions)
            try:
                return await self._transport.handle_async_request(request)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                failure = error
        raise failure

    async def _image(self, response: httpx.Response) -> bytes:
        if response.status_code != 200:
            raise UrlRefused(f"cannot be fetched: the answer was {response.status_code}")
        kind = response.headers.get("content-type", "")
        if not _is_image(kind):
            raise UrlRefused(f"is no image but of type {kind[:64]!r}")
        if response.headers.get("content-encoding", "identity") != "identity":
            raise UrlRefused("came compressed, which was not asked for")
        limit = self._config.max_image_bytes
        data = bytearray()
        async for chunk in response.aiter_raw():
            data += chunk
            if len(data) > limit:
                raise UrlRefused(f"has more than {limit} bytes")
        return bytes(data)


def read_data_url(url: str) -> bytes:
    """The bytes of `data:TYPE;base64,DATA` (RFC 2397). Raises ImageError."""
    head, comma, data = url.partition(",")
    kind, *parameters = head[len("data:") :].split(";")
    if not comma or [parameter.lower() for parameter in parameters[-1:]] != ["base64"] or not _is_image(kind):
        raise ImageError("its data: URL must begin with data:image/TYPE;base64,")
    try:
        return base64.b64decode(data, validate=True)
    except ValueError as error:
        raise ImageError(f"its data: URL holds no valid base64: {error}") from None


def _is_image(content_type: str) -> bool:
    """Whether it says so, or says nothing ("some bytes")."""
    kind = content_type.partition(";")[0].strip().lower()
    return kind.startswith("image/") or kind.endswith("/octet-stream")
