"""Formats of files and answers: each makes odd content of a valid one, and most of it is odd in one place only."""

import json
import struct
import zlib
from collections.abc import Callable

from hypothesis import strategies as st

from tests.fuzz import trees
from tests.fuzz.trees import Draw

Format = Callable[[Draw, bytes], bytes]
ODD_BYTES = (
    b"\0",
    b"\xff",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\x1b[2J",
    b"\n",
    b"\r\n",
    b"\x80\x02",
    b"PK\x03\x04",
    b"GGUF",
    b"{",
    b"---\n",
    b"\xed\xa0\x80",
    b"\0" * 64,
    b"\xff" * 8,
    b"<html>",
    b"version https://git-lfs.github.com/spec/v1\n",
)
ODD_NUMBERS = (0, 1, 7, 8, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def raw(draw: Draw, content: bytes) -> bytes:
    """Bytes flipped, cut, doubled, put in; lengths replaced."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        end = min(len(content), at + draw(st.sampled_from((1, 2, 4, 8, 64, 1000))))
        match draw(st.integers(0, 6)):
            case 0:
                content = content[:at]
            case 1:
                content = content[:at] + content[end:]
            case 2:
                content = content[:end] + content[at:end] + content[end:]
            case 3:
                content = content[:at] + draw(st.sampled_from(ODD_BYTES)) + content[at:]
            case 4:
                width, order = draw(st.sampled_from((("I", 4), ("Q", 8), ("H", 2)))), draw(st.sampled_from("<>"))
                number = draw(st.sampled_from(ODD_NUMBERS)) % (1 << 8 * width[1])
                content = content[:at] + struct.pack(order + width[0], number) + content[at + width[1] :]
            case _:
                flipped = bytes([content[at] ^ draw(st.integers(1, 255))]) if at < len(content) else b"\n"
                content = content[:at] + flipped + content[at + 1 :]
    return content


def junk(draw: Draw, _: bytes) -> bytes:
    return bytes(draw(st.one_of(st.binary(max_size=200), st.text(max_size=60).map(lambda text: text.encode()))))


def _with_junk(change: Format) -> Format:
    """Mostly one change of structure; sometimes bytes too, or nothing else."""

    def mixed(draw: Draw, content: bytes) -> bytes:
        kind = draw(st.integers(0, 19))
        if kind == 19:
            return junk(draw, content)
        if kind >= 17:
            return raw(draw, content)
        changed = change(draw, content)
        return raw(draw, changed) if kind >= 15 else changed

    return mixed


def _text(tree: object) -> bytes:
    return trees.written(tree).encode("utf-8", "surrogatepass")


def _json(draw: Draw, content: bytes) -> bytes:
    return _text(trees.mutated(draw, trees.parse(content.decode()), draw(st.integers(1, 3))))


def _safetensors(draw: Draw, content: bytes) -> bytes:
    """A header of JSON, whose length is right unless it is what is odd, and the data."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = _json(draw, content[8:end])
    data = content[end:]
    match draw(st.integers(0, 9)):
        case 0:
            return struct.pack("<Q", draw(st.sampled_from((*ODD_NUMBERS, len(header) + 1)))) + header + data
        case 1:
            data = raw(draw, data)
        case 2:
            header = content[8:end]
            data = draw(st.sampled_from((b"\xff", b"\x7f", b"\0", b"\x80\x7f"))) * len(data)
            data = data[: len(content) - end]
    return struct.pack("<Q", len(header)) + header + data


# Aliases of aliases: eight times as many values at each of seven steps.
BOMB = "{a0: &a0 [x], " + ", ".join(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 8)}]" for n in range(1, 8)) + "}"
# What YAML has and JSON has not.
YAML = (
    "&a [*a]",
    "*nobody",
    "!!python/object/apply:os.system [ls]",
    "!!int x",
    "!!float x",
    "!!timestamp x",
    "!!binary x",
    "2001-99-99",
    "2001-01-01",
    "2001-01-01T25:00:00Z",
    "0o9",
    "0x",
    "0b",
    "1:60:60",
    ".inf",
    ".nan",
    "1_0",
    "0_",
    "=",
    "~",
    "!!set {a}",
    "!!omap [a]",
    "!!pairs [a]",
    "{? [a]: b}",
    "{? {a: b}: c}",
    "{<<: 1}",
    "{<<: [1]}",
    "{<<: {a: b}}",
    "!x y",
    "!!map x",
    "!!seq x",
    "!!null x",
    "!!bool x",
    "!!str {}",
    "'\\x'",
    '"\\xff"',
    '"\\UFFFFFFFF"',
    "%",
    "@",
    "`",
    "|",
    ">",
    "[" * 2000,
    "{a: " * 1000,
    "[" * 200 + "]" * 200,
    "- " * 500,
    "? " * 500,
    "&a " * 20,
    "!" * 20,
    "# only a comment",
    BOMB,
    "{a: &a {x: &x {y: *x}}, b: *a}",
    "!!int '0x'",
    "!!int ''",
    "!!float ''",
    "190:20:30.15",
    "+.inf",
    "1e999",
    "9" * 5000,
)


def _yaml(draw: Draw, content: bytes) -> bytes:
    """Flow style, which is JSON with YAML's own values in it, or the content's own style with a value replaced."""
    import yaml

    if draw(st.booleans()):
        tree = trees.parse(json.dumps(yaml.safe_load(content)))
        tree = trees.mutated(draw, tree, draw(st.integers(1, 2)))
        text: str = trees.written(tree)
        return text.encode("utf-8", "surrogatepass")
    lines = content.decode().split("\n")
    at = draw(st.integers(0, len(lines) - 1))
    before, colon, _ = lines[at].partition(":")
    lines[at] = f"{before}{colon} {draw(st.sampled_from(YAML))}"
    return "\n".join(lines).encode()


def _front_matter(draw: Draw, content: bytes) -> bytes:
    """A README whose front matter is odd."""
    _, head, body = content.split(b"---\n", 2)
    return b"---\n" + _yaml(draw, head) + b"\n---\n" + body


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


ODD_CHUNKS = (
    _chunk(b"IHDR", struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)),
    _chunk(b"IHDR", struct.pack(">IIBBBBB", 2**31 - 1, 1, 16, 6, 0, 0, 1)),
    _chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 3, 3, 0, 0, 0)),
    _chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * (8 << 20))),
    _chunk(b"iTXt", b"a\0\x01\0\0\0" + zlib.compress(b"x" * (8 << 20))),
    _chunk(b"iCCP", b"a\0\0" + zlib.compress(b"x" * (8 << 20))),
    _chunk(b"eXIf", b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"),
    *(
        _chunk(kind, b"x")
        for kind in (b"tRNS", b"PLTE", b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"acTL", b"fcTL", b"fdAT", b"eXIf")
    ),
    *(
        _chunk(kind, b"")
        for kind in (b"tRNS", b"iCCP", b"zTXt", b"tEXt", b"iTXt", b"eXIf", b"acTL", b"fcTL", b"IDAT", b"IEND")
    ),
)


def _png(draw: Draw, content: bytes) -> bytes:
    """Chunks gone, doubled, replaced or changed, their checksums right."""
    chunks = []
    at = 8
    while at < len(content):
        end = at + 12 + int.from_bytes(content[at : at + 4], "big")
        chunks.append(content[at:end])
        at = end
    for _ in range(draw(st.integers(1, 2))):
        which = draw(st.integers(0, len(chunks) - 1))
        match draw(st.integers(0, 3)):
            case 0 if len(chunks) > 1:
                del chunks[which]
            case 1:
                chunks.insert(which, draw(st.sampled_from((*ODD_CHUNKS, *chunks))))
            case 2:
                chunks[which] = draw(st.sampled_from(ODD_CHUNKS))
            case _:
                chunks[which] = _chunk(chunks[which][4:8], raw(draw, chunks[which][8:-4]))
    return content[:8] + b"".join(chunks)


ODD_HEADERS = (
    "Content-Length: 5",
    "Content-Length: -1",
    "Content-Length: x",
    "Content-Length: 99999999999",
    "Transfer-Encoding: chunked",
    "Content-Encoding: gzip",
    "Content-Encoding: zstd",
    "Content-Type: text/html",
    "Content-Type: application/json; charset=utf-99",
    "Content-Type: application/json; charset=utf-16",
    "Retry-After: \xb2",
    "Retry-After: 99999999999",
    "Retry-After: -1",
    'RateLimit: "api";r=0;t=\xb2',
    "RateLimit: x",
    "RateLimit-Policy: x",
    "X-Error-Code: GatedRepo",
    "X-Error-Code: RepoNotFound",
    "X-Error-Message: \x1b[2J",
    "X-Error-Code: EntryNotFound",
    "X-Request-Id: " + "x" * 3000,
    "Location: /",
    "Location: //",
    "Set-Cookie: =",
    'Link: <x>; rel="next"',
    'Link: <http://127.0.0.1:1/x>; rel="next"',
    'ETag: "../../x"',
    "X-Repo-Commit: ../../x",
    "a" * 70000,
    ":",
    "",
    "X-HF-Warning: topic; \x1b[31m",
    "Content-Range: bytes 0-1/x",
    "X-Xet-Hash: x",
    "X-Linked-Size: x",
)
ODD_STATUS = (
    "204 No",
    "301 Moved",
    "302 Found",
    "400 Bad",
    "401 No",
    "403 No",
    "404 No",
    "409 No",
    "412 No",
    "413 No",
    "429 Slow",
    "500 No",
    "503 No",
    "099 x",
    "1000 x",
    "200",
    "abc",
    "",
)


def _http(draw: Draw, content: bytes) -> bytes:
    """An answer whose body is odd JSON, or whose status or headers are odd; its length is right unless it is odd."""
    head, _, body = content.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    kind = draw(st.integers(0, 9))
    if kind < 7:
        body = _with_junk(_json)(draw, body)
    if kind >= 6:
        lines.insert(draw(st.integers(1, len(lines))), draw(st.sampled_from(ODD_HEADERS)))
    if kind >= 8:
        lines[0] = f"HTTP/1.1 {draw(st.sampled_from(ODD_STATUS))}"
    lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


JSON = _with_junk(_json)
SAFETENSORS = _with_junk(_safetensors)
YAML_FILE = _with_junk(_yaml)
FRONT_MATTER = _with_junk(_front_matter)
PNG = _with_junk(_png)
HTTP = _http
