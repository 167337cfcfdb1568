"""What an upload survives: a wire that fails, lies or stalls, and SIGKILL.

A run ends in bounded time with one error line or with everything right, and the next run sends only what is missing.
"""

import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.hub_server import Fault, LoopbackHub
from tests.support.publications import (
    MERGE,
    ONE_BY_ONE,
    PICTURES,
    PUTS,
    REPO,
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
            one.faults.clear()
            assert there.run().code == 0
            check_published(there, one)
    finally:
        for server in hubs:
            server.__exit__(None, None, None)


def test_an_upload_without_an_end_is_ended(place: Place, hub: LoopbackHub, upload: str) -> None:
    hub.faults.append(Fault(f"{PUTS}|{XORBS}", times=-1, delay=600, status=503))
    begun = time.monotonic()
    done = place.run(LORA_FUSE_STALL_S="3")
    assert "no byte moved for 3 s" in done.refusal
    assert time.monotonic() - begun < 40
    assert is_untouched(hub)
    check_next_run(place, hub, sends=None)


def test_xet_that_stalls_is_left_for_lfs(place: Place, hub: LoopbackHub) -> None:
    hub.faults.append(Fault(XORBS, times=-1, delay=600, status=503))
    done = place.run(LORA_FUSE_STALL_S="3")
    assert done.code == 0, done.err
    assert "no byte moved for 3 s; check the connection and publish again; once more without Xet" in done.err
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


def test_a_full_disk_for_the_receipt_is_one_line(place: Place, hub: LoopbackHub) -> None:
    partial = place.root / "artifacts/.publish.json.partial"
    partial.symlink_to("/dev/full")
    line = place.run().refusal
    assert "artifacts/publish.json cannot be written (No space left on device), published:" in line
    partial.unlink()
    check_next_run(place, hub)
