"""One file of a commit, read by HTTP ranges: bytes are those of the range that was asked for, or they are refused.

A range goes on where it broke off. The Hub says where its storage has the file; that address is signed and asked for
again when it is no longer good, and the token does not go there. Pinned are the commit, the size and the sha256 that
the Hub promises of the file, and the ETag of each place that it comes from: a file does not change between two ranges.
"""

from __future__ import annotations

import re
import socket
import sys
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from threading import Event, Lock
from typing import TYPE_CHECKING, Any

from lora_fuse.errors import BadSource, ConnectionLost, Refused, WrongContent
from lora_fuse.hub.client import client, endpoint, token
from lora_fuse.hub.error_texts import explain, is_passing
from lora_fuse.hub.retry import DELAYS, requested_pause
from lora_fuse.hub.wire.pace import TOO_SLOW, Pace
from lora_fuse.machine import direct_io, text

if TYPE_CHECKING:
    from httpx2 import Response

    from lora_fuse.machine import FileRecord

HOPS = 5  # redirects
ENOUGH = 1 << 20  # bytes: an attempt that brought so many is none in vain
CONNECT = 10.0  # seconds, at most
EXPIRED = frozenset({400, 401, 403, 404, 410})  # answers of a storage to an address that was good once
CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
FETCH = "fetch the base first (`hf download`, or download.stream: false), and name the folder"


_connections: weakref.WeakSet[socket.socket] = weakref.WeakSet()  # that were made for ranges, and may be used again
_noting = Lock()


def end_waiting() -> None:
    """End every connection that ranges come over: who waits for a Hub that is silent fails at once."""
    with _noting:
        for one in _connections:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


def _note_connection(event: str, info: Mapping[str, Any]) -> None:
    """Note a connection that the client's HTTP library has made, by the events that it tells of."""
    if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
        with _noting:
            _connections.add(info["return_value"].get_extra_info("socket"))


class _Passing(Exception):
    """The same range may come if it is asked for again."""


class _Stalled(_Passing):
    """Too little moved for too long."""


class _Expired(_Passing):
    """The address of the storage is not good any more."""


class RemoteFile:
    """A file of a commit; `read` may be called by many threads, until `close`."""

    def __init__(self, repo_id: str, commit: str, name: str, record: FileRecord, stall_seconds: float) -> None:
        """Ask nothing yet; `record` is the promise of the Hub's list."""
        client()  # imports it, and has it guarded
        from huggingface_hub import hf_hub_url

        self.label = f"{name} of {repo_id}@{commit}"
        self.record = record
        self._repo_id = repo_id
        self._url = hf_hub_url(repo_id, name, revision=commit, endpoint=endpoint())
        self._stall_seconds = stall_seconds
        self._address: str | None = None
        self._etags: dict[str, str] = {}  # by address, without what signs it
        self._closed = Event()
        self._lock = Lock()
        self._locating = Lock()

    def close(self) -> None:
        """Have what is being read end, with the next bytes that come; see `end_waiting`."""
        self._closed.set()

    def read(self, memory: memoryview, start: int) -> None:
        """Fill memory with the bytes from `start` on.

        Raises:
            WrongContent: the file is not what was promised, or changes.
            ConnectionLost: they do not come, though they were asked for again.
            BadSource: the Hub refuses, or cannot give ranges.
            Stopped: see `close`.
        """
        done = 0
        failures: list[Exception] = []
        while done < len(memory):
            before = done
            try:
                for block in self._blocks(start + done, start + len(memory)):
                    memory[done : done + len(block)] = block
                    done += len(block)
                if done < len(memory):
                    raise _Passing(f"{len(memory) - done} bytes of a range did not come")
            except Refused:
                raise
            except Exception as error:  # the client raises anything where an answer is none
                if self._closed.is_set():
                    raise direct_io.Stopped from error
                if done - before >= ENOUGH:
                    failures.clear()
                failures.append(error)
                self._wait(failures)

    def _wait(self, failures: list[Exception]) -> None:
        """Wait before a range is asked for again, or raise."""
        from httpx2 import TimeoutException

        error = failures[-1]
        is_own = isinstance(error, _Passing)
        reason = str(error) if is_own else explain(error, self._repo_id)
        if not is_own and not is_passing(error):
            raise BadSource(f"{self.label}: {reason}") from error
        stalls = sum(isinstance(one, (_Stalled, TimeoutException)) for one in failures)
        is_last = len(failures) > len(DELAYS) or stalls > 1
        pause = None if is_last else requested_pause(error, DELAYS[len(failures) - 1])
        if pause is None:
            raise ConnectionLost(
                f"{self.label}: {reason}, {len(failures)} times; what is finished stays: check the connection, and run "
                "the same command again"
            ) from error
        if isinstance(error, _Expired):
            return
        text.say(f"{self.label}: {reason}; once more in {pause:g} s", sys.stderr)
        self._closed.wait(pause)

    def _blocks(self, start: int, stop: int) -> Iterator[bytes]:
        """The bytes from `start` (included) to `stop` (not included), as they come; there may be fewer."""
        pace = Pace(self._stall_seconds)
        left = stop - start
        with self._answer(start, stop) as response:
            for block in response.iter_raw():
                left -= len(block)
                if left < 0:
                    raise WrongContent(f"{self.label}: more bytes came than those from {start} to {stop}; {FETCH}")
                if self._closed.is_set():
                    raise direct_io.Stopped
                pace.add(len(block))
                if pace.quiet > self._stall_seconds:
                    raise _Stalled(f"{TOO_SLOW} {pace.quiet:.0f} s")
                yield block

    @contextmanager
    def _answer(self, start: int, stop: int) -> Iterator[Response]:
        """The answer to a range, from wherever the Hub has the file."""
        from huggingface_hub import get_session

        with self._locating:
            url = address = self._address or self._locate()
        for _ in range(HOPS):
            headers = {**_headers(url), "Range": f"bytes={start}-{stop - 1}"}
            asked = get_session().stream("GET", url, headers=headers, **self._how)
            with asked as response:
                if response.has_redirect_location:
                    url = str(response.url.join(response.headers["location"]))
                    continue
                if response.status_code in EXPIRED and not _is_home(address):
                    self._address = None if self._address == address else self._address
                    raise _Expired(f"the address of the storage is not good any more ({response.status_code})")
                self._check(response, start, stop)
                yield response
                return
        raise self._circle()

    def _locate(self) -> str:
        """Ask the Hub where the file is, as its own client does."""
        from huggingface_hub import get_session
        from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

        url = self._url
        for _ in range(HOPS):
            response = get_session().request("HEAD", url, headers=_headers(url), **self._how)
            hf_raise_for_status(response)
            self._check_promise(response)
            if not response.has_redirect_location:
                self._address = url
                return url
            url = str(response.url.join(response.headers["location"]))
            if not _is_home(url):
                self._address = url
                return url
        raise self._circle()

    @property
    def _how(self) -> dict[str, Any]:
        """Arguments of every request."""
        from httpx2 import Timeout

        timeout = Timeout(self._stall_seconds, connect=min(CONNECT, self._stall_seconds), pool=None)
        return {"follow_redirects": False, "timeout": timeout, "extensions": {"trace": _note_connection}}

    def _circle(self) -> BadSource:
        return BadSource(f"{self.label}: {endpoint()} sends it from one address to the next, {HOPS} times; {FETCH}")

    def _check(self, response: Response, start: int, stop: int) -> None:
        """Refuse an answer that is not the range that was asked for."""
        from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

        status = response.status_code
        if status >= 400:
            response.read()
            hf_raise_for_status(response)
        if status != 206:
            raise BadSource(
                f"{self.label}: asked for the bytes {start} to {stop - 1}, {response.url.host} answered {status}, not "
                f"206, as a server that knows no ranges does; {FETCH}"
            )
        said = response.headers.get("content-range", "")
        match = CONTENT_RANGE.fullmatch(said)
        if match is None or tuple(map(int, match.groups())) != (start, stop - 1, self.record.size):
            raise WrongContent(
                f"{self.label}: asked for the bytes {start} to {stop - 1} of {self.record.size}, the answer has "
                f"{said[:80]!r}"
            )
        etag = response.headers.get("etag")
        place = str(response.url).partition("?")[0]
        with self._lock:
            pinned = self._etags.setdefault(place, etag) if etag else etag
        if etag != pinned:
            raise WrongContent(f"{self.label} changed between two ranges: its ETag was {pinned}, and is {etag}")

    def _check_promise(self, response: Response) -> None:
        """Refuse a file that the Hub has changed since it was listed; a commit's own never do."""
        etag = response.headers.get("x-linked-etag", "").removeprefix("W/").strip('"')
        size = response.headers.get("x-linked-size", "")
        if len(etag) == len(self.record.sha256) and etag != self.record.sha256:
            raise WrongContent(f"{self.label}: the Hub's list says sha256 {self.record.sha256}, its answer {etag}")
        if size and int(size) != self.record.size:
            raise WrongContent(f"{self.label}: the Hub's list says {self.record.size} bytes, its answer {size}")


def _headers(url: str) -> dict[str, str]:
    """Headers of a request; the token goes to the Hub only."""
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    return build_hf_headers(token=(token() if _is_home(url) else None) or False, library_name="lora-fuse")


def _is_home(url: str) -> bool:
    from httpx2 import URL

    here = URL(url)
    home = URL(endpoint())
    return (here.scheme, here.host, here.port) == (home.scheme, home.host, home.port)
