"""Xet content-addressed storage: what `hf-xet` uploads (xorbs and shards) and how it gets files back.

A xorb is a run of compressed chunks; a shard says of each file which chunk ranges of which xorbs make it up.
Formats: huggingface.co/docs/xet (xorb, shard, CAS API). Only what the tests' client sends is understood.
"""

import hashlib
import re
import secrets
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lz4.frame
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.hub_server.lfs import file_range, ranged
from tests.hub_server.model import HubError

CHUNK_HEADER = 8  # bytes: version, packed length (3), scheme, unpacked length (3)
CHUNK_SIZE = 1 << 16  # bytes of content in a chunk that is made here
SHARD_HEADER, SHARD_ENTRY = 48, 48  # bytes
HAS_VERIFICATION, HAS_SHA256 = 1 << 31, 1 << 30
LAST = b"\xff" * 32
LZ4, BYTE_GROUPED = 1, 2


@dataclass(frozen=True, slots=True)
class Chunk:
    """Where a chunk lies in its xorb (with its header), and how it is packed."""

    offset: int
    packed: int
    unpacked: int
    scheme: int


@dataclass(frozen=True, slots=True)
class Term:
    """The chunks `start` (included) to `stop` (not included) of a xorb: `size` unpacked bytes of a file."""

    xorb: str
    size: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class XetFile:
    """How to put a file together."""

    terms: tuple[Term, ...]
    sha256: str | None

    @property
    def size(self) -> int:
        return sum(term.size for term in self.terms)


def hash_text(raw: bytes) -> str:
    """A Xet hash as text: four little-endian 64-bit words, each printed big end first."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))


def parse_xorb(data: bytes) -> list[Chunk]:
    """The chunks of a xorb, up to its footer."""
    chunks, at = [], 0
    while at + CHUNK_HEADER <= len(data) and data[at] == 0 and data[at : at + 7] != b"XETBLOB":
        packed = int.from_bytes(data[at + 1 : at + 4], "little")
        chunks.append(Chunk(at, CHUNK_HEADER + packed, int.from_bytes(data[at + 5 : at + 8], "little"), data[at + 4]))
        at += CHUNK_HEADER + packed
    if not chunks or at > len(data):
        raise HubError(400, message="malformed xorb")
    return chunks


def parse_shard(data: bytes) -> dict[str, XetFile]:
    """The files that a shard describes, by Xet hash."""
    if data[:14] != b"HFRepoMetaData":
        raise HubError(400, message="malformed shard")
    files, at = {}, SHARD_HEADER
    while (name := data[at : at + 32]) != LAST:
        flags, count = struct.unpack_from("<II", data, at + 32)
        at += SHARD_ENTRY
        terms = []
        for _ in range(count):
            _, size, start, stop = struct.unpack_from("<IIII", data, at + 32)
            terms.append(Term(hash_text(data[at : at + 32]), size, start, stop))
            at += SHARD_ENTRY
        at += SHARD_ENTRY * count if flags & HAS_VERIFICATION else 0
        sha256 = hash_text(data[at : at + 32]) if flags & HAS_SHA256 else None
        at += SHARD_ENTRY if flags & HAS_SHA256 else 0
        files[hash_text(name)] = XetFile(tuple(terms), sha256)
    return files


def unpack(chunk: Chunk, packed: bytes) -> bytes:
    """The content of a chunk; scheme 2 stores byte 0 of every four, then byte 1, and so on."""
    if chunk.scheme not in (LZ4, BYTE_GROUPED):
        return packed
    plain = bytes(lz4.frame.decompress(packed))
    if chunk.scheme == LZ4:
        return plain
    result, at = bytearray(chunk.unpacked), 0
    for lane in range(4):
        length = (chunk.unpacked - lane + 3) // 4
        result[lane::4] = plain[at : at + length]
        at += length
    return bytes(result)


def merged_ranges(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same numbers in as few ranges (stop not included) as there can be."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


class XetStore:
    """Xorbs in a folder and files in memory, with the routes of the CAS under `/cas`."""

    def __init__(self, root: Path, *, token_ttl: float = 3600.0) -> None:
        """`token_ttl`: for how many seconds a CAS token is good."""
        self._root, self._ttl = root, token_ttl
        self._chunks: dict[str, list[Chunk]] = {}
        self._files: dict[str, XetFile] = {}
        self._by_sha256: dict[str, str] = {}
        self._checked: set[str] = set()
        self._tokens: dict[str, tuple[float, str]] = {}
        self.base_url = ""
        root.mkdir(parents=True, exist_ok=True)

    def add(self, content: bytes) -> str:
        """Store a file as one xorb of its own, uncompressed; its Xet hash is made up, which no client notices."""
        sha256 = hashlib.sha256(content).hexdigest()
        xorb, name = (hashlib.sha256(f"{kind} {sha256}".encode()).hexdigest() for kind in ("xorb", "file"))
        blocks = [content[at : at + CHUNK_SIZE] for at in range(0, len(content), CHUNK_SIZE)]
        sizes = [len(block).to_bytes(3, "little") for block in blocks]
        packed = b"".join(b"\0%b\0%b%b" % (size, size, block) for size, block in zip(sizes, blocks, strict=True))
        (self._root / xorb).write_bytes(packed)
        self._chunks[xorb] = parse_xorb(packed)
        self._files[name] = XetFile((Term(xorb, len(content), 0, len(blocks)),), sha256)
        self._by_sha256[sha256] = name
        return name

    def find(self, sha256: str) -> str | None:
        return self._by_sha256.get(sha256)

    def size(self, name: str) -> int:
        return self._files[name].size

    def read(self, name: str) -> Iterator[bytes]:
        for term in self._files[name].terms:
            with (self._root / term.xorb).open("rb") as xorb:
                for chunk in self._chunks[term.xorb][term.start : term.stop]:
                    xorb.seek(chunk.offset + CHUNK_HEADER)
                    yield unpack(chunk, xorb.read(chunk.packed - CHUNK_HEADER))

    def is_intact(self, name: str) -> bool:
        """Whether the chunks of a file really have the sha256 that its shard claims."""
        if name not in self._checked:
            digest = hashlib.sha256()
            for block in self.read(name):
                digest.update(block)
            if digest.hexdigest() != self._files[name].sha256:
                return False
            self._checked.add(name)
        return True

    def grant(self, scope: str) -> Response:
        """A CAS token to `read` or `write`, as body and as headers."""
        token, expiry, url = secrets.token_hex(16), int(time.time() + self._ttl), f"{self.base_url}/cas"
        self._tokens[token] = (expiry, scope)
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(expiry)}
        return JSONResponse({"accessToken": token, "exp": expiry, "casUrl": url}, headers=headers)

    def routes(self) -> list[Route]:
        """The CAS API. Anything else is 404, on which the client goes another way."""
        return [
            Route("/cas/xorb/{name}", self._get_xorb, methods=["GET", "HEAD"]),  # stands for a signed URL
            Route("/cas/{version}/xorbs/{prefix}/{name}", self._post_xorb, methods=["POST"]),
            Route("/cas/v1/shards", self._post_shard, methods=["POST"]),
            Route("/cas/{version}/reconstructions/{name}", self._get_plan, methods=["GET"]),
        ]

    def _require(self, request: Request, scope: str) -> None:
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        expiry, granted = self._tokens.get(token, (0.0, ""))
        if expiry < time.time():
            raise HubError(401, message="invalid or expired xet token")
        if scope == "write" and granted != "write":
            raise HubError(403, message="this xet token may only read")

    async def _get_xorb(self, request: Request) -> Response:
        path = self._root / request.path_params["name"]
        return ranged(request, path.stat().st_size, lambda start, stop: file_range(path, start, stop), {})

    async def _post_xorb(self, request: Request) -> Response:
        self._require(request, "write")
        name, data = request.path_params["name"], await request.body()
        is_new = name not in self._chunks
        chunks = parse_xorb(data)
        (self._root / name).write_bytes(data)
        self._chunks[name] = chunks
        return JSONResponse({"was_inserted": is_new})

    async def _post_shard(self, request: Request) -> Response:
        self._require(request, "write")
        for name, file in parse_shard(await request.body()).items():
            for term in file.terms:
                if term.stop > len(self._chunks.get(term.xorb, ())):
                    raise HubError(400, message=f"the shard names chunks that {term.xorb} does not have")
            self._files[name] = file
            if file.sha256:
                self._by_sha256[file.sha256] = name
        return JSONResponse({"result": 1})

    async def _get_plan(self, request: Request) -> Response:
        self._require(request, "read")
        file = self._files.get(request.path_params["name"])
        if file is None:
            raise HubError(404, message="file not found")
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("range", ""))
        start, stop = (int(match[1]), int(match[2]) + 1) if match else (0, file.size)
        if start >= file.size > 0:
            raise HubError(416)
        terms, offset = self._cover(file, start, stop)
        listed = [
            {"hash": term.xorb, "unpacked_length": term.size, "range": {"start": term.start, "end": term.stop}}
            for term in terms
        ]
        is_v1 = request.path_params["version"] == "v1"
        fetch = self._fetch_plan(terms, is_v1=is_v1)
        return JSONResponse(
            {"offset_into_first_range": offset, "terms": listed, "fetch_info" if is_v1 else "xorbs": fetch}
        )

    def _cover(self, file: XetFile, start: int, stop: int) -> tuple[list[Term], int]:
        """The whole chunks that hold the bytes `start` to `stop`, and where in the first one `start` is."""
        covering: list[Term] = []
        position, offset = 0, 0
        for term in file.terms:
            chosen: list[int] = []
            for index in range(term.start, term.stop):
                size = self._chunks[term.xorb][index].unpacked
                if position + size > start and position < stop:
                    if not covering and not chosen:
                        offset = max(start - position, 0)
                    chosen.append(index)
                position += size
            if chosen:
                size = sum(self._chunks[term.xorb][index].unpacked for index in chosen)
                covering.append(Term(term.xorb, size, chosen[0], chosen[-1] + 1))
        return covering, offset

    def _fetch_plan(self, terms: list[Term], *, is_v1: bool) -> dict[str, list[dict[str, Any]]]:
        """Where to get the chunks of each xorb; every chunk is listed once, however often the file repeats it."""
        plan: dict[str, list[dict[str, Any]]] = {}
        for xorb in dict.fromkeys(term.xorb for term in terms):
            for start, stop in merged_ranges([(term.start, term.stop) for term in terms if term.xorb == xorb]):
                first, last = self._chunks[xorb][start], self._chunks[xorb][stop - 1]
                span = {"start": first.offset, "end": last.offset + last.packed - 1}  # end included
                chunks, url = {"start": start, "end": stop}, f"{self.base_url}/cas/xorb/{xorb}"
                item: dict[str, Any] = {"url": url, "range": chunks, "url_range": span}
                if not is_v1:
                    url = f"{url}?r={span['start']}-{span['end']}"
                    item = {"url": url, "ranges": [{"chunks": chunks, "bytes": span}]}
                plan.setdefault(xorb, []).append(item)
        return plan
