"""Every request and answer of the Hub's client, looked at on its way: it trusts a Hub in what it makes paths of.

The hooks see each hop of a redirect. What is not as it must be raises `UnsafeExchange` before the client sees it.
"""

from __future__ import annotations

import ipaddress
import os
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from lora_fuse.hub.wire import answers
from lora_fuse.machine import text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from httpx2 import Request, Response

PLAIN_HTTP = "LORA_FUSE_PLAIN_HTTP"
MOST = 16 << 20  # bytes of an answer that is kept in memory: a listing of 50,000 files
PAGE = 100_000  # bytes that a page of a listing counts for at least: a listing ends after 1,000 pages, or `LISTED`
LISTED = 100_000_000  # bytes
RESOLVED = re.compile(r"/resolve(?:-cache/models/[^/]+/[^/]+)?/([0-9a-f]{40})/")
ASKED = "lora_fuse.asked"  # the request's extension with the path below the endpoint that was asked at first
NO_HUB = "use another Hub (HF_ENDPOINT), or tell its owner"


class UnsafeExchange(ValueError):
    """A request that must not be sent, or an answer that no Hub gives; `response` is that answer."""

    def __init__(self, message: str, response: Response | None = None) -> None:
        super().__init__(text.line(message))
        self.response = response


def guard(endpoint: Callable[[], str]) -> None:
    """Have every later request of this process's Hub client looked at; `endpoint` says where the Hub is by then."""
    from httpx2 import Client
    from huggingface_hub import get_session, set_client_factory

    hooks = get_session().event_hooks
    if any(isinstance(getattr(hook, "__self__", None), _Guard) for hook in hooks["response"]):
        return
    guard = _Guard(endpoint)
    guarded: dict[str, list[Callable[..., Any]]] = {
        "request": [*hooks["request"], guard.check_request],
        "response": [guard.check_response, *hooks["response"]],
    }
    set_client_factory(lambda: Client(event_hooks=guarded, follow_redirects=True, timeout=None))


def is_private(url: str) -> bool:
    """True where nobody on the way can read along: by https, on this machine, or because the user says so."""
    parts = urlsplit(url)
    if parts.scheme == "https" or os.environ.get(PLAIN_HTTP) == "1":
        return True
    host = parts.hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _refuse_plain(url: str, response: Response | None = None) -> None:
    if not is_private(url):
        parts = urlsplit(url)
        raise UnsafeExchange(
            f"an access token would go over plain http to {parts.scheme}://{parts.netloc}, where others can read it; "
            f"use https, unset HF_TOKEN for what is public, or set {PLAIN_HTTP}=1 for a network that you trust",
            response,
        )


class _Guard:
    """The hooks: before a request is sent, and before the client has read a byte of an answer's body."""

    def __init__(self, endpoint: Callable[[], str]) -> None:
        self._endpoint = endpoint
        self._listed = 0  # bytes of the listing that is under way

    def check_request(self, request: Request) -> None:
        """Refuse a token where others can read it, and note the question, which a redirect keeps."""
        request.headers["Accept-Encoding"] = "identity"  # a packed body has any size
        if "authorization" in request.headers:
            _refuse_plain(str(request.url))
        path = str(request.url).partition("?")[0].removeprefix(self._endpoint().rstrip("/"))
        request.extensions.setdefault(ASKED, path)

    def check_response(self, response: Response) -> None:
        """Refuse an answer that no Hub gives."""
        request = response.request
        path = request.extensions[ASKED]
        is_api = path.startswith("/api/") and not path.startswith("/api/resolve-cache/")
        self._check_headers(response)
        if is_api or request.method != "GET" or not response.is_success:  # or else it goes to a file, which is watched
            _bound(response)
        if is_api and request.method == "GET" and response.is_success:
            content = response.read()
            self._count_pages(response, len(content))
            _refuse(answers.body_fault(path, content), response)

    def _check_headers(self, response: Response) -> None:
        headers = response.headers
        if response.has_redirect_location and not answers.is_etag(headers.get("etag", "")):
            headers.pop("etag", None)  # of the redirect's own words
        asked = RESOLVED.search(str(response.request.url))
        is_head = response.request.method == "HEAD" and response.status_code < 400
        _refuse(answers.header_fault(headers, asked[1] if asked else None, is_head=is_head), response)
        if (packed := headers.get("content-encoding", "identity")) != "identity":
            _refuse(f"content-encoding is {packed}, asked for was identity", response)
        if (storage := headers.get("x-xet-cas-url")) is not None:  # Xet's token goes there, past these hooks
            _refuse_plain(storage, response)

    def _count_pages(self, response: Response, size: int) -> None:
        goes_on = "next" in response.links or response.request.url.params.get("p", "0") != "0"
        self._listed = self._listed + max(size, PAGE) if goes_on else 0
        if self._listed > LISTED:
            _refuse(f"the listing has no end, after {self._listed} bytes", response)


def _refuse(fault: str | None, response: Response) -> None:
    if fault is not None:
        url = str(response.request.url).partition("?")[0]
        raise UnsafeExchange(
            f"the answer to {response.request.method} {url} is none of a Hub: {fault}; {NO_HUB}",
            response,
        )


def _bound(response: Response) -> None:
    """End an answer's body when it has more than `MOST` bytes."""
    from httpx2 import SyncByteStream

    stream: Any = response.stream

    class Bounded(SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            count = 0
            for block in stream:
                count += len(block)
                _refuse(f"it has more than {MOST} bytes" if count > MOST else None, response)
                yield block

        def close(self) -> None:
            stream.close()

    response.stream = Bounded()
