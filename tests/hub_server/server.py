"""The server: its parts put together, seeded from tests, and run by uvicorn in a thread."""

import hashlib
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tests.hub_server.api import LFS_SUFFIXES
from tests.hub_server.faults import Call, Fault, FaultyWire
from tests.hub_server.lfs import LfsStore
from tests.hub_server.model import Commit, Entry, HubError, Registry, Repo
from tests.hub_server.routes import HubApi
from tests.hub_server.xet import XetStore


class LoopbackHub:
    """A Hub on a free port of 127.0.0.1.

    Tokens: `hf_write` is alice's and may write to `alice/…`; `hf_other` is carol's and may write to `carol/…`;
    `hf_read` is bob's; `hf_expired` is refused.

    Args:
        root: a folder for what is uploaded.
        multipart_from: LFS uploads of so many bytes and more go in parts.
        page_size: how many entries a listing gives at once.
    """

    def __init__(self, root: Path, *, multipart_from: int | None = None, page_size: int = 1000) -> None:
        self.registry = Registry()
        self.lfs = LfsStore(root / "lfs", multipart_from=multipart_from)
        self.xet = XetStore(root / "xet")
        self.faults: list[Fault] = []
        self.log: list[Call] = []
        self._api = HubApi(self.registry, self.lfs, self.xet, page_size=page_size)
        routes = [*self.lfs.routes(), *self.xet.routes(), *self._api.routes()]
        app = Starlette(routes=routes, exception_handlers={HubError: _refuse, 404: _no_route})
        self._app = FaultyWire(app, self.faults, self.log)

    @property
    def url(self) -> str:
        return self._api.base_url

    def create(self, repo_id: str, *, private: bool = False, gated: bool = False) -> Repo:
        return self.registry.create(repo_id, private=private, gated=gated)

    def push(
        self, repo_id: str, files: Mapping[str, bytes | None], *, revision: str = "main", xet: bool = False
    ) -> Commit:
        """Commit files by path (None deletes one) to a repository, which is created if need be; large ones in Xet."""
        repo = self.registry.repos.get(repo_id) or self.create(repo_id)
        changes = {
            path: None if content is None else self._entry(path, content, xet=xet) for path, content in files.items()
        }
        return repo.commit(changes, revision=revision, title="push")

    def _entry(self, path: str, content: bytes, *, xet: bool = False) -> Entry:
        if not path.endswith(LFS_SUFFIXES):
            return Entry.regular(content)
        if xet:
            return Entry.lfs(hashlib.sha256(content).hexdigest(), len(content), self.xet.add(content))
        return Entry.lfs(self.lfs.add(content), len(content), None)

    def tamper(self, path: str, content: bytes) -> None:
        """From now on keep this content whenever a commit brings a file of that path."""
        self._api.tampered[path] = self._entry(path, content)

    def read(self, repo_id: str, path: str, *, revision: str = "main") -> bytes:
        entry = self.registry.repos[repo_id].at(revision).tree[path]
        if entry.sha256 is None:
            return entry.content
        return b"".join(self.xet.read(entry.xet)) if entry.xet else self.lfs.path(entry.sha256).read_bytes()

    def calls(self, text: str) -> list[Call]:
        return [call for call in self.log if text in call.line]

    def uploaded(self) -> int:
        """Bytes of large files that were sent here so far, with Xet or without."""
        return sum(call.received for call in self.log if re.match(r"PUT /_lfs/|POST /cas/[^/]*/xorbs/", call.line))

    @contextmanager
    def run(self) -> Iterator[Self]:
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        self._api.base_url = self.xet.base_url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(self._app, log_level="critical", lifespan="off", ws="none", timeout_keep_alive=30)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield self
        finally:
            server.should_exit = server.force_exit = True
            thread.join(5)
            listener.close()


async def _refuse(request: Request, error: Exception) -> Response:
    refusal = error if isinstance(error, HubError) else HubError(500, message=str(error))
    named = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message, "X-Request-Id": "loopback"}
    headers = {key: value for key, value in named.items() if value} | refusal.headers
    return JSONResponse({"error": refusal.message or refusal.code or "error"}, refusal.status, headers)


async def _no_route(request: Request, error: Exception) -> Response:
    return await _refuse(request, HubError(404, message=f"no such route: {request.method} {request.url.path}"))
