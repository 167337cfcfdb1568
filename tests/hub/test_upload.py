"""What an upload survives: a wire that fails, lies or stalls, answers that are lost or refusals, and SIGKILL.

A run ends in bounded time with one error line or with everything right, and the next run sends only what is missing.
`main` never holds half of a publication.
"""

import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.hub_server import Fault, LoopbackHub
from tests.support.publications import (
    COMMIT,
    MERGE,
    ONE_BY_ONE,
    PICTURES,
    PUTS,
    REPO,
    SHARDS,
    SIZE,
    TAG,
    XORBS,
    Place,
    check_next_run,
    check_published,
    finish,
    is_untouched,
    killed_when,
    large,
    repo,
)


@pytest.mark.parametrize(
    "fault",
    [{"drop_request_after": 60_000}, {"times": 2, "status": 500}, {"status": 429, "headers": {"Retry-After": "1"}}],
    ids=["dropped", "500-twice", "429"],
)
def test_an_upload_that_fails_for_a_while_succeeds(
    place: Place, hub: LoopbackHub, upload: str, fault: dict[str, Any]
) -> None:
    hub.faults.append(Fault(upload, **fault))
    done = place.run()
    assert done.code == 0, done.err
    assert hub.faults[0].hits == fault.get("times", 1)
    check_published(place, hub)


def test_uploads_that_fail_for_ever_end_with_one_line(tmp_path: Path, place: Place, hub: LoopbackHub) -> None:
    """Side by side, since the client tries for half a minute by itself."""
    kinds: dict[str, dict[str, Any]] = {"dropped": {"drop_request_after": 60_000}, "500": {"status": 500}}
    running: list[tuple[LoopbackHub, Place, subprocess.Popen[str]]] = []
    hubs: list[Any] = []
    try:
        for kind, fault in kinds.items():
            for xet in ("", "1"):
                server = LoopbackHub(tmp_path / f"hub-{kind}-{xet}").run()
                one = server.__enter__()
                hubs.append(server)
                one.faults.append(Fault(f"{PUTS}|{XORBS}", times=-1, **fault))
                env = {"HF_ENDPOINT": one.url, "HF_HUB_DISABLE_XET": xet, "HF_HOME": str(tmp_path / f"hf-{kind}-{xet}")}
                there = Place(tmp_path / f"project-{kind}-{xet}", {**place.env, **env})
                there.fill()
                there.configure()
                running.append((one, there, there.start()))
        for one, there, process in running:
            done = finish(process)
            assert REPO in done.refusal
            assert "once more without Xet" in done.err or there.env["HF_HUB_DISABLE_XET"]
            assert is_untouched(one)
            assert not (there.root / "artifacts/publish.json").exists()
            check_next_run(there, one, sends=None)
    finally:
        for server in hubs:
            server.__exit__(None, None, None)


def test_an_upload_without_an_end_is_ended(place: Place, hub: LoopbackHub, upload: str) -> None:
    silent = Fault(XORBS, times=-1, delay=600, status=503)
    hub.faults += [silent, Fault(PUTS, times=-1, trickle=0.2, status=200, body=bytes(1000))]
    begun = time.monotonic()
    done = place.run(LORA_FUSE_STALL_S="3")
    assert "less than 1 kB/s moved for 3 s" in done.refusal
    assert time.monotonic() - begun < 40
    assert is_untouched(hub)
    check_next_run(place, hub, sends=None)


def test_xet_that_stalls_is_left_for_lfs(place: Place, hub: LoopbackHub) -> None:
    hub.faults.append(Fault(XORBS, times=-1, delay=600, status=503))
    done = place.run(LORA_FUSE_STALL_S="3")
    assert done.code == 0, done.err
    assert "less than 1 kB/s moved for 3 s; check the connection and publish again; once more without Xet" in done.err
    check_published(place, hub)


@pytest.mark.parametrize("line", ["POST /api/repos/create", MERGE])
def test_a_hub_that_does_not_answer_is_left(place: Place, hub: LoopbackHub, line: str) -> None:
    hub.faults.append(Fault(line, times=-1, delay=600, status=503))
    begun = time.monotonic()
    assert REPO in place.run(LORA_FUSE_STALL_S="2").refusal
    assert time.monotonic() - begun < 30


def test_a_kill_during_the_upload_sends_only_the_rest(place: Place, hub: LoopbackHub, upload: str) -> None:
    """A commit a file: pictures, vocabulary and two shards are there, the third is under way."""
    done = PICTURES + 3
    hub.faults.append(Fault(upload, skip=done, times=-1, delay=600, status=503))
    killed_when(place, hub, upload, done, "-c", ONE_BY_ONE)
    assert is_untouched(hub)
    check_next_run(place, hub, sends=2 * SIZE)
    assert len(repo(hub).pulls) == 1


def test_a_kill_within_a_commit_sends_only_the_rest(place: Place, hub: LoopbackHub) -> None:
    """Without Xet every file that arrived counts, though no commit names it yet."""
    place.env["HF_HUB_DISABLE_XET"] = "1"
    hub.faults.append(Fault(PUTS, skip=2, times=-1, delay=600, status=503))
    killed_when(place, hub, PUTS, 2)
    check_next_run(place, hub, sends=None)
    assert hub.uploaded() <= large(place) + 2000  # nothing twice


@pytest.mark.parametrize("line", [MERGE, TAG], ids=["before-merge", "before-tag"])
def test_a_kill_after_the_upload_sends_nothing_again(place: Place, hub: LoopbackHub, upload: str, line: str) -> None:
    place.configure(tag="v1")
    hub.faults.append(Fault(line, times=-1, delay=600, status=503))
    killed_when(place, hub, line, 0)
    assert is_untouched(hub) == (line == MERGE)
    assert not (place.root / "artifacts/publish.json").exists()
    check_next_run(place, hub)
    assert len(repo(hub).pulls) == 1
    assert repo(hub).tags == {"v1": repo(hub).head.oid}


def test_a_receipt_that_cannot_be_written_is_one_line(place: Place, hub: LoopbackHub) -> None:
    receipt = place.root / "artifacts/publish.json"
    receipt.mkdir()
    line = place.run().refusal
    assert "artifacts/publish.json cannot be written (Is a directory), published:" in line
    receipt.rmdir()
    check_next_run(place, hub)


@pytest.mark.parametrize(("line", "status"), [(COMMIT, None), (COMMIT, 504), (MERGE, 504), (TAG, None)])
def test_an_answer_that_is_lost_changes_nothing(place: Place, hub: LoopbackHub, line: str, status: int | None) -> None:
    place.configure(tag="v1")
    hub.faults.append(Fault(line, after=True, status=status))
    done = place.run()
    assert done.code == 0, done.err
    assert hub.faults[0].hits == 1
    check_published(place, hub)
    assert len(repo(hub).pulls) == 1
    assert repo(hub).tags == {"v1": repo(hub).head.oid}


def test_a_commit_is_tried_again_when_the_hub_is_busy(place: Place, hub: LoopbackHub, upload: str) -> None:
    hub.faults += [Fault(COMMIT, status=503), Fault(COMMIT, status=429, headers={"Retry-After": "2"})]
    begun = time.monotonic()
    done = place.run()
    assert done.code == 0, done.err
    assert "once more in 2 s" in done.err
    assert time.monotonic() - begun > 3
    check_published(place, hub)
    assert hub.uploaded() < large(place) + 2000  # nothing twice


@pytest.mark.parametrize(("status", "said"), [(412, "somebody else was faster"), (503, "answered 503")])
def test_a_commit_that_is_refused_is_one_line(
    place: Place, hub: LoopbackHub, upload: str, status: int, said: str
) -> None:
    hub.faults.append(Fault(COMMIT, status=status, times=-1, body=b"{}"))
    assert said in place.run().refusal
    assert (is_untouched(hub), repo(hub).pulls) == (True, {})
    check_next_run(place, hub)


@pytest.mark.parametrize("status", [403, 409])
def test_a_merge_that_is_refused_leaves_a_whole_pull_request(place: Place, hub: LoopbackHub, status: int) -> None:
    hub.faults.append(Fault(MERGE, status=status, times=-1, body=b"{}"))
    line = place.run().refusal
    assert f"answered {status}" in line
    assert f"{hub.url}/{REPO}/discussions/1" in line
    assert is_untouched(hub)
    assert {*place.manifest.files, "README.md"} <= repo(hub).at("refs/pr/1").tree.keys()
    check_next_run(place, hub)
    assert len(repo(hub).pulls) == 1


def test_what_arrives_as_something_else_is_not_merged(place: Place, hub: LoopbackHub) -> None:
    name = SHARDS[1]
    hub.tamper(name, b"something else")
    assert f": {name} " in place.run().refusal
    assert is_untouched(hub)
    hub._api.tampered.clear()
    check_next_run(place, hub)
    assert len(repo(hub).pulls) == 1


@pytest.mark.parametrize("is_the_same", [True, False])
def test_a_tag_that_exists_counts_only_on_the_same_commit(place: Place, hub: LoopbackHub, is_the_same: bool) -> None:
    place.configure(tag="v1")
    assert place.run().code == 0
    repo(hub).tags["v1"] = repo(hub).head.oid if is_the_same else next(iter(repo(hub).commits))
    commits = dict(repo(hub).commits)
    done = place.run()
    if is_the_same:
        assert (done.code, place.receipt.tag) == (0, "v1")
    else:
        assert f"the tag v1 on commit {repo(hub).tags['v1']}" in done.refusal
        assert repo(hub).head.oid in done.refusal
    assert repo(hub).commits == commits


def test_a_tag_on_other_bytes_is_refused_before_anything_is_sent(place: Place, hub: LoopbackHub) -> None:
    place.configure(tag="v1")
    assert place.run().code == 0
    place.fill(seed=1)
    sent, tagged = hub.uploaded(), dict(repo(hub).tags)
    assert "set publish.tag to a new name" in place.run().refusal
    assert (hub.uploaded(), len(repo(hub).pulls), repo(hub).tags) == (sent, 1, tagged)


def test_what_is_tagged_stays_published_when_main_moves_on(place: Place, hub: LoopbackHub) -> None:
    place.configure(tag="v1")
    assert place.run().code == 0
    before = place.receipt
    hub.push(REPO, {"LICENSE": b"theirs"})
    assert place.run().code == 0
    assert place.receipt == before


def test_two_variants_of_one_repository_are_each_had_by_their_tag(place: Place, hub: LoopbackHub) -> None:
    place.configure(tag="soft")
    assert place.run().code == 0
    soft = place.receipt
    place.fill(seed=1)
    place.configure(tag="strong")
    assert place.run().code == 0
    assert repo(hub).tags == {"soft": soft.commit, "strong": repo(hub).head.oid}
    place.fill()
    place.configure(tag="soft")
    sent, commits = hub.uploaded(), dict(repo(hub).commits)
    assert place.run().code == 0
    assert (place.receipt, hub.uploaded(), repo(hub).commits) == (soft, sent, commits)
