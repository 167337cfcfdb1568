"""The answers of a Hub's API as they must be, and the headers: what is hex, a size, a file's name. Pure.

The Hub's client makes paths of ETags, commits and names as it is given them, and fails anyhow where a value is of
another kind. So each answer is checked here before the client sees it; what is not named here nobody relies on.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field, RootModel, ValidationError
from pydantic.alias_generators import to_camel

LONGEST_PART = 255  # bytes of a file's or folder's name (NAME_MAX); of a path, PATH_MAX less the cache's own part
LONGEST_PATH = 2048
MOST_ITEMS = 100_000  # of a list
SHOWN = 80  # characters of a value that a message shows


def file_name(name: str) -> str:
    """A POSIX path below a repository's root, as it is.

    Raises:
        ValueError: it leads out, is not in its plainest form, holds a control character or a backslash, which parts
            folders elsewhere, or is longer than a filesystem allows.
    """
    parts = name.split("/")
    if (
        not {"", ".", ".."}.isdisjoint(parts)
        or re.search(r"[\x00-\x1f\x7f\\\ud800-\udfff]", name)
        or max(len(part.encode()) for part in parts) > LONGEST_PART
        or len(name.encode()) > LONGEST_PATH
    ):
        raise ValueError("no file below a repository can have this name")
    return name


_Commit = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Size = Annotated[int, Field(ge=0, lt=1 << 62)]
_Name = Annotated[str, AfterValidator(file_name)]


class _Answer(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, strict=True)


class _Lfs(_Answer):
    oid: _Sha256 | None = None
    sha256: _Sha256 | None = None
    size: _Size | None = None


class _File(_Answer):
    rfilename: _Name | None = None  # in a repository's own listing
    path: _Name | None = None  # in a tree
    size: _Size | None = None
    blob_id: _Commit | None = None
    oid: _Commit | None = None
    xet_hash: _Sha256 | None = None
    lfs: _Lfs | None = None


_BOUNDED = Field(max_length=MOST_ITEMS)
_Files = Annotated[list[_File], _BOUNDED, FailFast()]


class _Tree(RootModel[_Files]):
    model_config = ConfigDict(strict=True)


class _Revision(_Answer):
    sha: _Commit | None = None
    private: bool | None = None
    card_data: dict[str, Any] | None = None
    siblings: _Files = []


class _Ref(_Answer):
    name: str
    target_commit: _Commit


class _Refs(_Answer):
    tags: Annotated[list[_Ref], _BOUNDED, FailFast()]


class _Pull(_Answer):
    num: Annotated[int, Field(gt=0)]
    title: str
    status: str
    is_pull_request: bool


class _Pulls(_Answer):
    discussions: Annotated[list[_Pull], _BOUNDED, FailFast()]
    count: int
    start: int


class _Account(_Answer):
    name: str


# Of what is asked with GET, by its path below the endpoint; the first that matches counts.
_SHAPES: tuple[tuple[str, type[BaseModel]], ...] = (
    (r"/api/whoami-v2", _Account),
    (r"/api/models/.+/tree/.+", _Tree),
    (r"/api/models/.+/refs", _Refs),
    (r"/api/models/.+/discussions", _Pulls),
    (r"/api/models/.+/discussions/\d+", _Pull),
    (r"/api/models/[^/]+(/[^/]+)?(/revision/[^/]+)?", _Revision),
)
# Headers that the client makes paths or numbers of. An ETag may be weak, and is a hash of git, LFS or a mirror.
_HEX = re.compile(r"[0-9a-f]{40}")
_ETAG = re.compile(r'(W/)?"?[0-9a-fA-F]{32,64}"?')
_NUMBER = re.compile(r"[0-9]{1,18}")
_HEADERS = {
    "x-repo-commit": (_HEX, "40 hex digits"),
    "x-linked-etag": (_ETAG, "hex digits"),
    "x-linked-size": (_NUMBER, "a number of bytes"),
    "x-xet-hash": (re.compile(r"[0-9a-fA-F]{64}"), "64 hex digits"),
}
_OF_HEAD = {"etag": _HEADERS["x-linked-etag"]}  # where there is no linked one


def body_fault(path: str, content: bytes) -> str | None:
    """The first thing in an answer's body that is not as it must be; None if all is, or nobody relies on the answer.

    `path` is that of the question, percent-encoded, below the endpoint.
    """
    shape = next((shape for pattern, shape in _SHAPES if re.fullmatch(pattern, path)), None)
    if shape is None:
        return None
    try:
        answer = shape.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "the answer"
        return f"{where} is {_shown(first['input'])}: {first['msg']}"
    asked = re.search(r"/revision/([0-9a-f]{40})$", path)
    if asked and isinstance(answer, _Revision) and answer.sha not in (None, asked[1]):
        return f"sha is {answer.sha}, asked for was {asked[1]}"
    return None


def header_fault(headers: Mapping[str, str], asked: str | None, *, is_head: bool) -> str | None:
    """The first header that is not as it must be; None if all are. `asked` is the commit that a file was asked of."""
    wanted = _HEADERS if not is_head or "x-linked-etag" in headers else {**_HEADERS, **_OF_HEAD}
    for name, (pattern, expected) in wanted.items():
        value = headers.get(name)
        if value is not None and not pattern.fullmatch(value):
            return f"{name} is {_shown(value)}, not {expected}"
    commit = headers.get("x-repo-commit", asked)
    return None if asked in (None, commit) else f"x-repo-commit is {commit}, asked for was {asked}"


def is_etag(value: str) -> bool:
    """True for an ETag that can name a file."""
    return _ETAG.fullmatch(value) is not None


def _shown(value: object) -> str:
    """The beginning of a value, whatever its size."""
    if isinstance(value, (str, bytes)):
        return repr(value[:SHOWN]) + ("…" if len(value) > SHOWN else "")
    return reprlib.repr(value)
