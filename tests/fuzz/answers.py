"""Parsers of a Hub's answers: a server on loopback answers one question oddly and all others as a Hub does."""

import json
import os
import queue
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from lora_fuse.hub import retry, worker
from lora_fuse.hub.remote import RemoteRepository
from lora_fuse.hub.repository import list_repository
from lora_fuse.hub.sizes import base_size
from tests.fuzz import formats
from tests.fuzz.parsers import Parser, these
from tests.support.tiny import on_hub

COMMIT = "c" * 40
KEY = "d" * 64
CONTENT = b"12345"
BLOB = "5" * 40
MODEL = {
    "_id": "0",
    "id": "a/b",
    "modelId": "a/b",
    "sha": COMMIT,
    "private": False,
    "gated": False,
    "tags": ["x"],
    "downloads": 1,
    "cardData": {"license": "apache-2.0", "tags": ["a"]},
    "lastModified": "2026-01-01T00:00:00.000Z",
    "disabled": False,
    "siblings": [
        {"rfilename": "model_index.json", "blobId": BLOB, "size": 5},
        {"rfilename": "transformer/config.json", "blobId": BLOB, "size": 5},
        {
            "rfilename": "transformer/diffusion_pytorch_model.safetensors",
            "blobId": BLOB,
            "size": 5,
            "lfs": {"sha256": KEY, "size": 5, "pointerSize": 9},
        },
    ],
}
PULL = {
    "num": 1,
    "title": f"x {KEY}",
    "status": "open",
    "isPullRequest": True,
    "author": {"name": "me", "avatarUrl": "x"},
    "createdAt": "2026-01-01T00:00:00.000Z",
    "repo": {"name": "a/b", "type": "model"},
    "changes": {"base": "refs/heads/main"},
    "filesWithConflicts": False,
    "diffUrl": "x",
    "isReport": False,
    "repoOwner": {"name": "a"},
}
EVENT = {
    "id": "1",
    "type": "comment",
    "author": {"name": "me"},
    "createdAt": PULL["createdAt"],
    "data": {
        "latest": {"raw": "x", "html": "x", "updatedAt": PULL["createdAt"], "author": {"name": "me"}},
        "edited": False,
        "hidden": False,
    },
}


def answer(content: object, *headers: str, status: str = "200 OK") -> bytes:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    head = [f"HTTP/1.1 {status}", "Content-Type: application/json", "Connection: close", *headers]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


# By what the first line of a request has in it; the first that fits counts.
ANSWERS = {
    "/resolve/": answer(CONTENT, f'ETag: "{BLOB}"', f"X-Repo-Commit: {COMMIT}"),
    "/discussions/1": answer(
        {**PULL, "events": [EVENT], "diff": "x", "mergeCommitId": None, "targetBranch": "refs/heads/main"}
    ),
    "/discussions": answer({"discussions": [PULL], "count": 1, "start": 0, "numClosedDiscussions": 0}),
    "/whoami": answer({"type": "user", "name": "me", "auth": {"accessToken": {"role": "write"}}}),
    "/refs": answer(
        {
            "branches": [{"name": "main", "ref": "refs/heads/main", "targetCommit": COMMIT}],
            "converts": [],
            "tags": [{"name": "v1", "ref": "refs/tags/v1", "targetCommit": COMMIT}],
        }
    ),
    "/api/repos/create": answer({"url": "https://huggingface.co/a/b", "id": "0"}),
    "/api/models/": answer(MODEL),
}


class Server(socketserver.ThreadingTCPServer):
    """Answers each request with bytes, whatever they are; `odd` are those of one kind of request."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.odd = ("", b"")
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 60}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: object) -> None:
        """The client has gone."""


class Handler(socketserver.StreamRequestHandler):
    """One request and its answer."""

    server: Server

    def handle(self) -> None:
        asked = self.rfile.readline(1 << 16).decode("latin-1")
        length = 0
        while (line := self.rfile.readline(1 << 16)).strip():
            if line.lower().startswith(b"content-length:"):
                length = int(line.partition(b":")[2])
        self.rfile.read(length)
        where, odd = self.server.odd
        kind = next((kind for kind in ANSWERS if kind in asked), "/api/models/")
        content = odd if kind == where else ANSWERS[kind]
        head, _, body = content.partition(b"\r\n\r\n")
        if b"content-length" not in head.lower():
            head += b"\r\nContent-Length: %d" % len(body)
        with suppress(OSError):
            self.wfile.write(head + b"\r\n\r\n" + (b"" if asked.startswith("HEAD") else body))


@cache
def server() -> Server:
    return Server()


def asked(where: str, ask: Callable[[], object]) -> Callable[[Path, bytes], object]:
    """Ask a Hub that answers the questions of one kind with the content; nobody waits."""

    def parse(folder: Path, content: bytes) -> None:
        server().odd = (where, content)
        set_here = {
            "HF_ENDPOINT": server().url,
            "HF_HOME": str(folder / "hf"),
            "HF_TOKEN": "hf_x",
            "HF_HUB_DISABLE_XET": "1",
            "LORA_FUSE_STALL_S": "5",
        }
        with patch.dict(os.environ, set_here), patch.object(retry, "DELAYS", ()), patch("time.sleep"):
            ask()

    return parse


def fetched() -> None:
    """A file, as the worker fetches it."""
    said: list[dict[str, Any]] = []
    go: queue.SimpleQueue[str] = queue.SimpleQueue()
    go.put("go")
    order = {
        "repo_id": "a/b",
        "commit": COMMIT,
        "sizes": {"model_index.json": len(CONTENT)},
        "again": True,
        "workers": 1,
    }
    worker._fetch(order, lambda **message: said.append(message), go, {})


def rows() -> Iterator[Parser]:
    repository = RemoteRepository("a/b")
    questions: dict[str, tuple[str, Callable[[], object]]] = {
        "a list of files": ("/api/models/", lambda: list_repository("a/b", None, timeout=2.0)),
        "a size": ("/api/models/", lambda: base_size(on_hub("a/b"), None, timeout=2.0)),
        "a repository to publish to": ("/api/models/", lambda: repository.open(private=False)),
        "pull requests": ("/discussions", lambda: repository.pulls(KEY)),
        "a pull request": ("/discussions/1", lambda: repository.pull(1)),
        "who we are": ("/whoami", lambda: repository.pulls(KEY)),
        "tags": ("/refs", lambda: repository.tag("v1", COMMIT)),
        "a file": ("/resolve/", fetched),
    }
    for name, (where, ask) in questions.items():
        yield Parser(
            f"Hub, {name}",
            asked(where, ask),
            formats.HTTP,
            these(ANSWERS[where]),
            allowed=("socket.connect",),
        )
