"""Large files by sha256: storage, the LFS batch API with single and multipart uploads, ranged downloads."""

import hashlib
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.hub_server.model import HubError

MIB = 1 << 20


def file_range(path: Path, start: int, stop: int) -> Iterator[bytes]:
    """The bytes from `start` (included) to `stop` (not included) of a file."""
    with path.open("rb") as file:
        file.seek(start)
        while start < stop:
            block = file.read(min(MIB, stop - start))
            start += len(block)
            yield block


def ranged(
    request: Request, size: int, read: Callable[[int, int], Iterator[bytes]], headers: dict[str, str]
) -> Response:
    """Answer a GET or HEAD of `size` bytes, or of the range that it asks for."""
    start, stop, status = 0, size, 200
    if match := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", "")):
        start, stop, status = int(match[1]), min(int(match[2]) + 1, size) if match[2] else size, 206
        if start >= size:
            raise HubError(416, headers={"Content-Range": f"bytes */{size}"})
        headers = headers | {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}
    headers = headers | {"Content-Length": str(stop - start), "Accept-Ranges": "bytes"}
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers)
    return StreamingResponse(read(start, stop), status, headers)


class LfsStore:
    """Files by sha256 in a folder, with the routes under `/_lfs`, which stand for signed URLs."""

    def __init__(self, root: Path, *, multipart_from: int | None = None, part_size: int = 5 * MIB) -> None:
        """Objects of `multipart_from` bytes and more are uploaded in parts of `part_size`."""
        self._root, self._multipart_from, self._part_size = root, multipart_from, part_size
        root.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        return self._root / sha256

    def add(self, content: bytes) -> str:
        sha256 = hashlib.sha256(content).hexdigest()
        self.path(sha256).write_bytes(content)
        return sha256

    def write(self, sha256: str, blocks: Iterator[bytes]) -> None:
        """Store an object block by block, whole or not at all."""
        digest, partial = hashlib.sha256(), self._root / secrets.token_hex(8)
        with partial.open("wb") as file:
            for block in blocks:
                digest.update(block)
                file.write(block)
        if digest.hexdigest() != sha256:
            partial.unlink()
            raise HubError(400, message="BadDigest: the content has another sha256")
        partial.replace(self.path(sha256))

    def batch(self, wanted: dict[str, Any], base_url: str, held: Callable[[str], bool]) -> dict[str, Any]:
        """Answer an LFS batch request: where to upload each object that is not `held` yet."""
        multipart = "multipart" in wanted.get("transfers", ()) and self._multipart_from is not None
        objects = []
        for item in wanted["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if not held(item["oid"]):
                answer["actions"] = self._actions(item, f"{base_url}/_lfs/{item['oid']}", multipart)
            objects.append(answer)
        return {"transfer": "multipart" if multipart else "basic", "objects": objects}

    def _actions(self, item: dict[str, Any], href: str, multipart: bool) -> dict[str, Any]:
        upload: dict[str, Any] = {"href": href}
        if multipart and item["size"] >= (self._multipart_from or 0):
            count = -(-item["size"] // self._part_size)
            parts = {f"{number:05d}": f"{href}/part/{number}" for number in range(1, count + 1)}
            upload = {"href": f"{href}/complete", "header": {"chunk_size": str(self._part_size), **parts}}
        return {"upload": upload, "verify": {"href": f"{href}/verify"}}

    def routes(self) -> list[Route]:
        """The routes of the storage; none asks who you are, as signed URLs do not."""
        return [
            Route("/_lfs/{oid}", self._get, methods=["GET", "HEAD"]),
            Route("/_lfs/{oid}", self._put, methods=["PUT"]),
            Route("/_lfs/{oid}/part/{number}", self._put_part, methods=["PUT"]),
            Route("/_lfs/{oid}/complete", self._complete, methods=["POST"]),
            Route("/_lfs/{oid}/verify", self._verify, methods=["POST"]),
        ]

    async def _get(self, request: Request) -> Response:
        path = self.path(unquote(request.path_params["oid"]))
        reader = lambda start, stop: file_range(path, start, stop)  # noqa: E731
        return ranged(request, path.stat().st_size, reader, {"ETag": f'"{path.name}"'})

    async def _put(self, request: Request) -> Response:
        self.write(request.path_params["oid"], iter([await request.body()]))
        return Response(headers={"ETag": '"whole"'})

    async def _put_part(self, request: Request) -> Response:
        number = int(request.path_params["number"])
        content = await request.body()
        self._part(request.path_params["oid"], number).write_bytes(content)
        return Response(headers={"ETag": f'"{hashlib.sha256(content).hexdigest()}"'})

    async def _complete(self, request: Request) -> Response:
        oid, body = request.path_params["oid"], await request.json()
        parts = [
            self._part(oid, part["partNumber"]) for part in sorted(body["parts"], key=lambda part: part["partNumber"])
        ]
        self.write(oid, (part.read_bytes() for part in parts))
        for part in parts:
            part.unlink()
        return JSONResponse({})

    async def _verify(self, request: Request) -> Response:
        path, body = self.path(request.path_params["oid"]), await request.json()
        if not path.exists() or path.stat().st_size != body["size"]:
            raise HubError(404, message="Object not found")
        return JSONResponse({})

    def _part(self, oid: str, number: int) -> Path:
        return self._root / f"{oid}.part{number}"
