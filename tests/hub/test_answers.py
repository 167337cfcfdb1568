"""Whatever a Hub answers is refused in one line, or is such that the client makes harmless paths of it."""

import json
import re
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from lora_fuse.hub.wire.answers import MOST_ITEMS, body_fault, file_name, header_fault

ASKED = (
    *("/api/models/a/b", "/api/models/a/b/revision/main", f"/api/models/a/b/revision/{'a' * 40}", "/api/whoami-v2"),
    *("/api/models/a/b/tree/main", "/api/models/a/b/refs", "/api/models/a/discussions", "/api/models/a/discussions/1"),
)
WORDS = ("sha", "siblings", "rfilename", "path", "size", "lfs", "oid", "sha256", "xetHash", "blobId", "tags", "name")
HEX = st.text("0123456789abcdef", min_size=39, max_size=41) | st.text("0123456789abcdef", min_size=64, max_size=64)
VALUES = st.none() | st.booleans() | st.integers() | st.text() | HEX | st.sampled_from(["../x", "a/b", 1e9, 1e999])
ANSWERS = st.recursive(VALUES, lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(WORDS), inner))


def hashes_and_names(answer: Any) -> tuple[list[str], list[str]]:
    """The values by which the client names files, in a tree or a revision's list."""
    files = answer if isinstance(answer, list) else answer.get("siblings", [])
    found = [file.get(key) for file in files for key in ("oid", "blobId", "xetHash")]
    found += [(file.get("lfs") or {}).get(key) for file in files for key in ("oid", "sha256")]
    names = [file.get(key) for file in files for key in ("rfilename", "path")]
    return [value for value in found if value is not None], [name for name in names if name is not None]


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(ASKED), st.binary() | ANSWERS.map(lambda answer: json.dumps(answer).encode()))
def test_any_answer_is_refused_or_harmless(path: str, content: bytes) -> None:
    fault = body_fault(path, content)
    assert fault is None or len(fault) < 2000
    if fault is None and ("tree" in path or re.fullmatch(r"/api/models/a/b(/revision/.*)?", path)):
        hashes, names = hashes_and_names(json.loads(content))
        assert all(re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", value) for value in hashes)
        assert all(file_name(name) == name and not {"..", ""} & set(name.split("/")) for name in names)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(("etag", "x-linked-etag", "x-repo-commit", "x-xet-hash")), st.text() | HEX)
def test_any_header_is_refused_or_harmless(name: str, value: str) -> None:
    fault = header_fault({name: value}, None, is_head=True)
    assert fault is not None or re.fullmatch(r'(W/)?"?[0-9A-Fa-f]{32,64}"?', value)


def test_a_list_of_countless_items_is_refused_at_once() -> None:
    for item in (b"5", b"{}"):
        content = b'{"siblings":[' + item + (b"," + item) * (2 * MOST_ITEMS) + b"]}"
        assert str(body_fault("/api/models/a/b", content)).startswith("siblings")
