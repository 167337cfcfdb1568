"""A Hub that is not to be trusted: what it says is checked before the client makes paths, numbers or requests of it."""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from httpx2 import HTTPStatusError, Request, Response

from lora_fuse.errors import PublishRefused, Refused
from lora_fuse.hub import client, lock_lora, retry
from lora_fuse.hub.remote import RemoteRepository
from lora_fuse.hub.repository import list_repository
from lora_fuse.hub.wire import guard
from lora_fuse.hub.wire.guard import PLAIN_HTTP, UnsafeExchange, is_private
from lora_fuse.hub.wire.pace import LEAST, Pace
from lora_fuse.recipe import hf_cache
from lora_fuse.recipe.sections import DownloadParams
from tests.hub_server import Fault, LoopbackHub
from tests.support.downloads import BIG, CONTENT, FILE, LORA, leftovers
from tests.support.repositories import refusal
from tests.support.tiny import on_hub

REPO = "alice/merged"
COMMIT = "c" * 40
AWAY = "http://192.0.2.1"  # RFC 5737: nobody has this address
JSON = {"content-type": "application/json"}


def answer(match: str, body: object, **fault: Any) -> Fault:
    """A Hub that answers a body, of bytes or to be made JSON, to whatever matches."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Fault(match, **{"times": -1, "status": 200, "headers": JSON, "body": raw, **fault})


def listing(**changes: object) -> dict[str, object]:
    return {"id": LORA, "sha": COMMIT, "siblings": [{"rfilename": FILE, "size": 3, **changes}]}


NO_ANSWERS: dict[str, object] = {
    "null": None,
    "list": [],
    "text": "what?",
    "no JSON": b"<html>",
    "not UTF-8": b'{"id": "\xff"}',
    "deep": b"[" * 200_000,
    "endless number": b'{"id": ' + b"9" * 5000 + b"}",
    "nothing": {},
    "commit that is a path": {"id": LORA, "sha": "../../../.ssh", "siblings": []},
    "commit of another kind": {"id": LORA, "sha": 5},
    "files of another kind": {"id": LORA, "sha": COMMIT, "siblings": 5},
    "date of another kind": {"id": LORA, "sha": COMMIT, "lastModified": 5},
    "card of another kind": {"id": LORA, "sha": COMMIT, "cardData": [1]},
    "size of another kind": listing(size="b"),
    "size below zero": listing(size=-1),
    "size without end": b'{"id": "a/b", "siblings": [{"rfilename": "a", "size": 1e999}]}',
    "lfs of another kind": listing(lfs="x"),
    "sha256 of another kind": listing(lfs={"sha256": "../x", "size": 3, "pointerSize": 1}),
    **{f"name {name!r:.9}": listing(rfilename=name) for name in ("../x", "/etc/x", "a/../../x", "a//x", ".", "a\0b")},
    **{f"name {name!r:.9}": listing(rfilename=name) for name in ("a\\..\\x", "a\nb", "\ud800", "x" * 256, "a/" * 2000)},
}


def test_an_answer_that_is_none_is_one_line(hub: LoopbackHub) -> None:
    """One Hub for all: a Hub takes longer than an answer."""
    for what, body in NO_ANSWERS.items():
        hub.faults[:] = [answer("GET /api/models", body)]
        line = refusal(lambda: list_repository(LORA, None, timeout=20))
        assert (line.startswith(f"{LORA}@main: "), "HF_ENDPOINT" in line) == (True, True), (what, line)
    assert len(hub.calls("/api/models")) == len(NO_ANSWERS)
    hub.faults[:] = [Fault("GET /api/models", status=307, headers={"Location": "/else"}), answer("GET /else", None)]
    assert "the answer is None" in refusal(lambda: list_repository(LORA, None, timeout=20))
    hub.faults[:] = [answer("GET /api/models", listing())]
    line = refusal(lambda: list_repository(LORA, "d" * 40, timeout=20))
    assert f"sha is {COMMIT}, asked for was {'d' * 40}" in line
    for body in (None, [], {"error": [{}], "errors": 5}, b"[" * 200_000):
        hub.faults[:] = [answer("GET /api/models", body, status=404)]
        assert refusal(lambda: list_repository(LORA, None, timeout=20)).startswith(f"{LORA}@main: ")


def to_be_published(work: Callable[[RemoteRepository], object]) -> str:
    return str(refusal(lambda: work(RemoteRepository(REPO)), kind=PublishRefused))


Work = Callable[[RemoteRepository], object]
PUBLISHING: tuple[tuple[str, object, Work], ...] = (
    ("GET .*/refs", {}, lambda it: it.tagged("v1")),
    ("GET .*/refs", {"tags": [{"name": "v1", "ref": "v1", "targetCommit": "../x"}]}, lambda it: it.tagged("v1")),
    ("GET .*/discussions", None, lambda it: it.pulls("key")),
    ("GET .*/discussions", {"discussions": [{"num": "1"}], "count": 1, "start": 0}, lambda it: it.pulls("key")),
    ("GET .*/discussions/", [], lambda it: it.pull(1)),
    ("GET .*/whoami", {}, lambda it: it.pulls("")),
    ("GET .*/whoami", {"name": 5}, lambda it: it.pulls("")),
    ("GET /api/models/alice", {"id": REPO, "sha": COMMIT, "private": "no"}, lambda it: it.open(private=True)),
)


def test_what_a_publication_asks_is_checked_too(hub: LoopbackHub) -> None:
    hub.create(REPO, private=True).open_pull("a", "alice")
    for match, body, work in PUBLISHING:
        hub.faults[:] = [answer(match, body)]
        assert "HF_ENDPOINT" in to_be_published(work), (match, body)


def test_a_pause_that_is_no_number_is_none(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "DELAYS", (0.0,))
    for after in ("\xb2", "1" * 400, "-1", "soon"):
        hub.log.clear()
        hub.faults[:] = [Fault("GET /api/models", times=-1, status=429, headers={"Retry-After": after})]
        assert "429" in to_be_published(lambda it: it.read())
        assert len(hub.calls("/api/models")) == 2, after
    for after, pause in (("300", 300.0), ("301", None), ("1" * 9, None)):
        asked = Request("GET", f"{hub.url}/_lfs/x")
        error = HTTPStatusError("", request=asked, response=Response(503, headers={"Retry-After": after}))
        assert retry.requested_pause(error, 0.0) == pause


HEAD = {"ETag": f'"{COMMIT}"', "X-Repo-Commit": COMMIT}
BAD_HEADERS: dict[str, tuple[int, dict[str, str]]] = {
    "etag": (200, {**HEAD, "ETag": '"../../../x"'}),
    "weak etag": (200, {**HEAD, "ETag": 'W/"/etc/x"'}),
    "linked etag": (200, {**HEAD, "X-Linked-Etag": '"../../../x"'}),
    "linked etag of a redirect": (302, {**HEAD, "X-Linked-Etag": '"../x"', "Location": f"{AWAY}/x"}),
    "commit": (200, {**HEAD, "X-Repo-Commit": "../../../x"}),
    "another commit": (200, {**HEAD, "X-Repo-Commit": "d" * 40}),
    "commit of what is not there": (404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": "../../../x"}),
    "size": (200, {**HEAD, "X-Linked-Size": "-1"}),
    "packed": (200, {**HEAD, "Content-Encoding": "gzip"}),
    "xet hash": (200, {**HEAD, "X-Xet-Hash": "../x"}),
    "token's goal": (200, {**HEAD, "X-Xet-Cas-Url": AWAY}),
}


def test_headers_that_the_client_would_make_paths_of_are_refused(hub: LoopbackHub) -> None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    client.client()
    for status, headers in BAD_HEADERS.values():
        hub.faults[:] = [Fault("HEAD", status=status, headers=headers)]
        with pytest.raises(UnsafeExchange):
            get_hf_file_metadata(hf_hub_url(LORA, FILE, revision=COMMIT, endpoint=hub.url))


def test_the_words_of_a_redirect_may_have_any_etag(hub: LoopbackHub) -> None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    commit = hub.push(LORA, {FILE: BIG}).oid
    moved = {"ETag": 'W/"2d-x/y="', "Location": f"/{LORA}/resolve/{commit}/{FILE}"}
    hub.faults.append(Fault("HEAD /bob/old", status=307, headers=moved))
    client.client()
    assert get_hf_file_metadata(hf_hub_url("bob/old", FILE, endpoint=hub.url)).size == len(BIG)


def fetch(stall: float = 20) -> None:
    lock_lora(on_hub(LORA), FILE, previous=None, transfer=DownloadParams(workers=2, stall_seconds=stall))


@pytest.mark.parametrize("by", ["header", "tree"])
def test_no_hub_writes_to_a_file_of_its_choice(hub: LoopbackHub, tmp_path: Path, by: str) -> None:
    """An ETag is the client's name for a file; it may come in a header, or in the list of a tree with Xet."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    path = f"{'../' * 30}{str(victim)[1:]}"
    commit = hub.push(LORA, {FILE: BIG}).oid
    if by == "header":
        headers = {"ETag": f'"{path}"', "X-Repo-Commit": commit}
        hub.faults.append(Fault("/resolve/", times=-1, status=200, headers=headers, body=b"evil"))
    else:
        lfs = {"oid": path, "size": 4, "pointerSize": 4}
        file = {"type": "file", "path": FILE, "oid": COMMIT, "size": 4, "lfs": lfs, "xetHash": "a" * 64}
        hub.faults.append(answer("GET .*/tree/", [file]))
    line = refusal(fetch)
    assert "is none of a Hub" in line
    assert path[:60] in line
    assert victim.read_text() == "precious"


def test_a_list_of_an_unguarded_client_is_not_believed(hub: LoopbackHub, tmp_path: Path) -> None:
    """The client keeps the list of a tree for all its runs, and makes a lock by the hash in it."""
    commit = hub.push(LORA, {FILE: BIG}).oid
    away = f"{'../' * 30}{str(tmp_path)[1:]}/victim"
    file = {"size": 4, "blob_id": COMMIT, "lfs_sha256": away, "lfs_size": 4, "xet_hash": "a" * 64}
    kept = hf_cache.repository_folder(LORA) / "trees" / f"{commit}.json"
    kept.parent.mkdir(parents=True)
    kept.write_text(json.dumps({"format_version": 1, "files": {FILE: file}}))
    fetch()
    assert not list(tmp_path.glob("victim*"))


def test_a_body_has_no_more_bytes_than_promised(hub: LoopbackHub) -> None:
    commit = hub.push(LORA, {FILE: BIG}).oid
    hub.faults.append(Fault(CONTENT, times=-1, status=200, body=bytes(60_000_000)))
    assert f"more than the {len(BIG)} bytes that the Hub promises came" in refusal(fetch)
    assert not leftovers()
    hub.faults[:] = [Fault("HEAD", status=200, headers={**HEAD, "X-Repo-Commit": commit, "X-Linked-Size": "9"})]
    assert f"has 9 bytes where it is fetched from, and {len(BIG)} in the Hub's list" in refusal(fetch)


def test_an_answer_that_does_not_end_is_ended(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MOST", 1000)
    hub.faults.append(answer("GET /api/models", b" " * 2000))
    assert "more than 1000 bytes" in refusal(lambda: list_repository(LORA, None, timeout=20))
    monkeypatch.setattr(guard, "LISTED", 20 * guard.PAGE)
    about = {"title": "x", "status": "open", "createdAt": "2024-01-01T00:00:00.000Z", "isPullRequest": True}
    pull = {**about, "num": 1, "repo": {"name": REPO, "type": "model"}}
    hub.faults[:] = [answer("GET .*/discussions", {"discussions": [pull], "count": 10**9, "start": 0})]
    assert "the listing has no end" in to_be_published(lambda it: it.pulls("key"))
    assert len(hub.calls("/discussions")) == 22
    hub.faults[:] = [
        answer("GET .*/tree/", [], headers={**JSON, "Link": f'<{hub.url}/api/models/a/tree/b>; rel="next"'})
    ]
    with pytest.raises(UnsafeExchange, match="the listing has no end"):
        list(client.client().list_repo_tree(LORA))


def test_countless_pull_requests_of_the_same_bytes_are_not_all_read(hub: LoopbackHub) -> None:
    repo = hub.create(REPO, private=True)
    numbers = [repo.open_pull("key", "alice").number for _ in range(25)]
    assert [pull.num for pull in RemoteRepository(REPO).pulls("key")] == numbers[-20:]


def test_an_answer_that_trickles_is_not_waited_for(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte in a tenth of a second: no pause is as long as the limit."""
    hub.faults.append(answer("GET /api/models", listing(), trickle=0.1))
    begun = time.monotonic()
    line = refusal(lambda: list_repository(LORA, None, timeout=0.5, once=True))
    assert "no whole answer in 0.5 s" in line
    monkeypatch.setenv("LORA_FUSE_STALL_S", "0.5")
    assert "no whole answer in 0.5 s" in to_be_published(lambda it: it.read())
    assert time.monotonic() - begun < 5


def test_a_transfer_is_under_way_while_enough_of_it_moves() -> None:
    pace = Pace(0.2)
    for _ in range(3):
        time.sleep(0.1)
        pace.add(LEAST * 0.2)
        assert pace.quiet < 0.1
    for _ in range(5):
        time.sleep(0.05)
        pace.add(1)
    assert pace.quiet > 0.2
    pace.restart()
    assert pace.quiet < 0.2


def test_a_token_goes_over_plain_http_to_nobody_else(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "an access token would go over plain http to http://192.0.2.1,"
    next_page = {**JSON, "Link": f'<{AWAY}/next>; rel="next"'}
    hub.faults.append(answer("GET .*/tree/", [], headers=next_page))
    with pytest.raises(UnsafeExchange, match=said):
        list(client.client().list_repo_tree(LORA))
    monkeypatch.setenv("HF_ENDPOINT", AWAY)
    assert said in refusal(lambda: list_repository(LORA, None, timeout=20))


def test_who_can_read_along_is_known_by_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    safe = (
        "https://hub.example",
        "http://127.0.0.1:8080",
        "http://127.9.9.9",
        "http://[::1]:80/x",
        "http://localhost:1",
    )
    plain = (
        *(
            "http://10.0.0.1",
            "http://hub",
            "http://localhost.example",
            "http://127.0.0.1.example",
            "HTTP://hub.example",
        ),
        *("http://127.0.0.1@hub.example", "http://0.0.0.0", "ftp://hub.example"),
    )
    assert all(map(is_private, safe))
    assert not any(map(is_private, plain))
    monkeypatch.setenv(PLAIN_HTTP, "1")
    assert all(map(is_private, plain))


def test_a_mistake_of_our_own_limits_keeps_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_FUSE_STALL_S", "never")
    assert "LORA_FUSE_STALL_S is 'never'" in refusal(partial(RemoteRepository(REPO).read), kind=Refused)
