"""The download stage while the wire fails, rights lack, disks fill up, runs are killed: real stage, client and Hub.

What goes wrong once is overcome; what goes wrong always is one `error:` line, exit 2, no traceback and no lock.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.hub_server import Fault, LoopbackHub
from tests.support.downloads import BASE, BIG, CONTENT, FILE, LIMIT, LORA, Project, fetched, leftovers, processes
from tests.support.machine import small_disk as mounted
from tests.support.machine import until
from tests.support.repositories import PIPELINE

ONCE = {
    "drop": Fault(CONTENT, drop_after=100_000),
    "500 twice": Fault(CONTENT, times=2, status=500),
    "429": Fault(CONTENT, status=429, headers={"Retry-After": "1"}),
    "short body": Fault(CONTENT, truncate_to=1000),
    "flipped byte": Fault(CONTENT, flip_at=70_000),
    "stall": Fault(CONTENT, delay=600),
    "HEAD 500": Fault("HEAD /bob/lora/resolve", times=2, status=500),
    "503 of the API": Fault("GET /api/models/bob/lora", times=2, status=503),
    "429 of the API": Fault("GET /api/models/bob/lora", status=429, headers={"Retry-After": "1"}),
}


def pairs(faults: Iterable[str]) -> list[tuple[str, str]]:
    """Each fault with both transports, where that makes a difference."""
    return [(name, kind) for name in faults for kind in ("lfs", "xet") if kind == "lfs" or "API" not in name]


@pytest.mark.parametrize(("name", "transport"), pairs(ONCE), indirect=["transport"])
def test_what_goes_wrong_once_is_overcome(hub: LoopbackHub, project: Project, transport: str, name: str) -> None:
    fault = replace(ONCE[name])
    hub.faults.append(fault)
    begun = time.monotonic()
    project.run()
    assert fault.hits == ONCE[name].times
    assert project.lock()["files"][FILE]["size"] == len(BIG)
    assert not leftovers()
    assert time.monotonic() - begun < 14


def test_a_transfer_that_is_slow_but_moves_is_left_alone(hub: LoopbackHub, project: Project, transport: str) -> None:
    hub.faults.append(Fault(CONTENT, times=-1, bytes_per_s=600_000))
    assert "trying again" not in project.run(stall=4)
    assert len(fetched(hub)) == 1


ALWAYS = {
    "drop": (Fault(CONTENT, drop_after=0), "less than 1 kB/s moved for"),
    "500": (Fault(CONTENT, status=500), "500"),
    "short body": (Fault(CONTENT, truncate_to=1000), "Consistency check failed: file should be of size 3000000"),
    "flipped byte": (Fault(CONTENT, flip_at=70_000), "expected "),
    "stall": (Fault(CONTENT, delay=600), "less than 1 kB/s moved for"),
    "HEAD 500": (Fault("HEAD /bob/lora/resolve", status=500), "500"),
    "503 of the API": (Fault("GET /api/models/bob/lora", status=503), "503"),
}


@pytest.mark.parametrize(("name", "transport"), pairs(ALWAYS), indirect=["transport"])
def test_what_goes_wrong_always_is_one_line(hub: LoopbackHub, project: Project, transport: str, name: str) -> None:
    fault, said = ALWAYS[name]
    hub.faults.append(replace(fault, times=-1))
    line = project.refused()
    assert said in line
    assert LORA in line
    assert not leftovers()
    if (name, transport) in {("drop", "xet"), ("flipped byte", "lfs")}:  # what comes next is the same for all
        hub.faults.clear()
        project.run()


def test_a_stalled_transfer_goes_on_without_xet_if_it_may(hub: LoopbackHub, project: Project) -> None:
    hub.push(LORA, {FILE: BIG}, xet=True)
    hub.faults.append(Fault("GET /cas/xorb", times=-1, delay=600))
    output = project.run()
    assert re.search(r"download: .*: less than 1 kB/s moved for 3 s; trying again without Xet", output)
    assert [call.line.split("/")[1] for call in fetched(hub) if not call.struck] == ["_lfs"]


def test_without_xet_no_xet_is_used(hub: LoopbackHub, project: Project) -> None:
    hub.push(LORA, {FILE: BIG}, xet=True)
    project.run(HF_HUB_DISABLE_XET="1")
    assert not hub.calls("/cas/")
    assert hub.calls("/_lfs/")


def test_who_may_not_is_told_what_is_missing(hub: LoopbackHub, project: Project) -> None:
    hub.create(LORA, gated=True)
    hub.push(LORA, {FILE: BIG})
    hub.registry.repos["alice/secret"] = hub.create("carol/secret", private=True)
    hub.push("carol/secret", {FILE: BIG})
    project.set_lora()
    page = f"the repository is gated; ask for access at {hub.url}/{LORA}, then"
    assert f"{page} set HF_TOKEN" in project.refused(HF_TOKEN="")
    assert f"{page} give HF_TOKEN the right to read gated repositories, at" in project.refused()
    assert "401" in project.refused(HF_TOKEN="hf_expired")  # noqa: S106
    assert "renew HF_TOKEN" in project.refused(HF_TOKEN="hf_nobody")  # noqa: S106
    project.set_lora(repo_id="carol/secret")
    said = "carol/secret@main: no such repository, or a private one; check the name, or"
    assert f"{said} set HF_TOKEN" in project.refused(HF_TOKEN="")
    assert f"{said} give HF_TOKEN the scope repo.content.read for it" in project.refused()
    assert not fetched(hub)


def test_what_is_not_there_is_named(hub: LoopbackHub, project: Project) -> None:
    commit = hub.push(LORA, {FILE: BIG}).oid
    project.set_lora(repo_id="bob/gone")
    assert "error: bob/gone@main: no such repository" in project.refused()
    project.set_lora(revision="v9")
    assert f"error: {LORA}@v9: no such revision" in project.refused()
    project.set_lora("gone.safetensors")
    assert f"error: {LORA}@{commit} has no gone.safetensors" in project.refused()


@pytest.mark.parametrize(
    ("status", "way_out"),
    [(401, "renew HF_TOKEN"), (403, "give HF_TOKEN the right to do this (scope repo.content.read)")],
)
def test_a_token_that_ends_on_the_way_is_named(hub: LoopbackHub, project: Project, status: int, way_out: str) -> None:
    hub.push(LORA, {FILE: BIG})
    hub.faults.append(Fault("(HEAD|GET) .*/resolve/", times=-1, status=status))
    line = project.refused()
    assert str(status) in line
    assert way_out in line


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with mounted(tmp_path / "small", "6m") as folder:
        monkeypatch.setenv("HF_HUB_CACHE", str(folder / "hub"))
        yield folder


def test_what_the_disk_has_no_room_for_is_not_begun(
    hub: LoopbackHub, project: Project, small_disk: Path, transport: str
) -> None:
    (small_disk / "filler").write_bytes(bytes(4 << 20))
    line = project.refused()
    assert f"error: {FILE} of {LORA}@" in line
    assert "needs 3.00MB (3000000 bytes), and the disk of" in line
    assert re.search(r"has 2\.\d+MB \(2\d{6} bytes\) free", line)
    assert not fetched(hub)
    (small_disk / "filler").unlink()
    assert "3.00MB to fetch, 6." in project.run()


def test_a_disk_that_fills_up_on_the_way_is_named(
    hub: LoopbackHub, project: Project, small_disk: Path, transport: str
) -> None:
    hub.faults.append(Fault(CONTENT, times=-1, delay=1, bytes_per_s=3e6))
    process = project.start()
    until(lambda: fetched(hub))
    with contextlib.suppress(OSError):
        (small_disk / "filler").write_bytes(bytes(6 << 20))
    err = process.communicate(timeout=LIMIT)[1]
    assert process.returncode == 2, err
    assert "is full; make room, or set HF_HUB_CACHE" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not project.locks()
    assert not list(small_disk.rglob("*.incomplete"))


def test_the_lock_stays_until_it_is_told_to_move(hub: LoopbackHub, project: Project) -> None:
    first = hub.push(BASE, PIPELINE).oid
    lora = hub.push(LORA, {FILE: BIG}).oid
    project.set(repo_id=BASE, revision="main")
    project.run()
    changed = {"vae/config.json": b"{ }", "vae/tokens.txt": b"new", "tokenizer/merges.txt": None}
    second = hub.push(BASE, changed).oid
    before = project.locks()
    project.run()
    assert project.locks() == before
    output = project.run("--update")
    assert [line for line in output.splitlines() if line.startswith("update: ")] == [
        f"update: {BASE} main: {first} -> {second}: 1 added, 1 removed, 1 changed",
        "update:   added vae/tokens.txt",
        "update:   removed tokenizer/merges.txt",
        "update:   changed vae/config.json",
        f"update: {LORA} main: still {lora}",
    ]
    assert project.lock("base")["revision"] == second
    assert "unset HF_HUB_OFFLINE" in project.refused("--update", HF_HUB_OFFLINE="1")


def test_an_update_goes_with_overrides(hub: LoopbackHub, project: Project) -> None:
    hub.push(LORA, {FILE: BIG})
    project.run()
    moved = hub.push(LORA, {FILE: BIG[:1000]}).oid
    lora = "loras={l: {filename: lora.safetensors, path: null, repo_id: bob/lora, revision: main}}"
    project.run("--update", "base.path=base", "loras=null", f"++{lora}")
    assert project.lock()["revision"] == moved
    assert "--unknown" in project.refused("--unknown")


def test_a_pull_request_a_tag_and_a_branch_can_be_named(hub: LoopbackHub, project: Project) -> None:
    commit = hub.push(LORA, {FILE: BIG})
    repo = hub.registry.repos[LORA]
    repo.tags["v1"] = commit.oid
    pull = repo.open_pull("better", "carol")
    better = hub.push(LORA, {FILE: BIG[:1000]}, revision=f"refs/pr/{pull.number}").oid
    hub.push(LORA, {FILE: BIG[:2000]}, revision="main")
    for revision, oid in ((f"refs/pr/{pull.number}", better), ("v1", commit.oid), (commit.oid, commit.oid)):
        project.set_lora(revision=revision)
        project.run()
        assert (project.lock()["requested"], project.lock()["revision"]) == (revision, oid)


def test_offline_everything_is_there_or_what_is_missing_is_named(hub: LoopbackHub, project: Project) -> None:
    hub.push(BASE, PIPELINE)
    commit = hub.push(LORA, {FILE: BIG}).oid
    project.set(repo_id=BASE, revision="main")
    project.run()
    asked = len(hub.log)
    project.run(HF_HUB_OFFLINE="1")
    assert len(hub.log) == asked
    next(Path(os.environ["HF_HOME"]).rglob(f"snapshots/{commit}/{FILE}")).unlink()
    line = project.refused(HF_HUB_OFFLINE="1")
    assert f"error: {FILE} of {LORA}@{commit} is not on this machine" in line
    assert len(hub.log) == asked


SIZES = {
    "transformer/model-1-of-2.safetensors": 1_000_000,
    "transformer/model-2-of-2.safetensors": 1_000_000,
    "vae/model.safetensors": 4_000_000,
}


def large(hub: LoopbackHub, *, xet: bool) -> dict[str, bytes]:
    """A base with large weights; the file that comes last is the largest."""
    files = {name: os.urandom(SIZES[name]) if name in SIZES else data for name, data in PIPELINE.items()}
    hub.push(BASE, files, xet=xet)
    return files


@pytest.mark.parametrize("xet", [False, True])
def test_after_kill_9_only_what_is_missing_is_fetched(hub: LoopbackHub, project: Project, xet: bool) -> None:
    files = large(hub, xet=xet)
    hub.push(LORA, {FILE: BIG}, xet=xet)
    project.set(repo_id=BASE, revision="main")
    hub.faults.append(Fault(CONTENT, skip=3, times=-1, bytes_per_s=1_000_000))  # the LoRA and two shards pass
    process = project.start(workers=1)
    until(lambda: len(fetched(hub)) == 4 and leftovers() and (xet or leftovers()[0].stat().st_size))
    assert processes("lora_fuse.hub.worker")
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    until(lambda: not processes("lora_fuse.hub.worker"), seconds=5)
    assert leftovers()
    assert not project.locks()
    hub.faults.clear()
    hub.log.clear()
    output = project.run()
    assert ("of killed transfers of bob/base removed" in output) != xet  # Xet had not written a byte
    assert not leftovers()
    assert len(fetched(hub)) == 1
    assert 4_000_000 <= sum(call.sent for call in fetched(hub)) < 4_100_000
    assert project.lock("base")["files"].keys() == files.keys()


@pytest.mark.parametrize("xet", [False, True])
def test_two_downloads_at_once_fetch_everything_once(
    hub: LoopbackHub, project: Project, tmp_path: Path, xet: bool
) -> None:
    large(hub, xet=xet)
    hub.push(LORA, {FILE: BIG}, xet=xet)
    (tmp_path / "other").mkdir()
    other = Project(tmp_path / "other")
    hub.faults.append(Fault(CONTENT, times=-1, bytes_per_s=1_000_000))
    for one in (project, other):
        one.set(repo_id=BASE, revision="main")
    running = [project.start()]
    until(lambda: fetched(hub))
    orphan = Path(os.environ["HF_HOME"], f"hub/models--bob--lora/blobs/{'0' * 64}.01234567.incomplete")
    until(orphan.parent.is_dir)
    orphan.write_bytes(b"of a killed run")  # the second run cleans up while the first one's transfer is under way
    running.append(other.start())
    for process in running:
        err = process.communicate(timeout=LIMIT)[1]
        assert process.returncode == 0, err
    assert project.locks() == other.locks()
    assert project.lock()["files"][FILE]["sha256"] == hashlib.sha256(BIG).hexdigest()
    assert len(fetched(hub)) == 4
    assert not leftovers()


def test_what_a_live_process_fetches_stays_and_is_not_waited_for_without_end(
    hub: LoopbackHub, project: Project
) -> None:
    commit = hub.push(LORA, {FILE: BIG})
    etag = str(commit.tree[FILE].sha256)
    home = Path(os.environ["HF_HOME"], "hub")
    names = ("models--bob--lora/blobs", ".locks/models--bob--lora")
    blobs, locks = (home / name for name in names)
    for folder in (blobs, locks):
        folder.mkdir(parents=True)
    held, orphan = blobs / f"{etag}.01234567.incomplete", blobs / f"{'0' * 64}.01234567.incomplete"
    for path in (held, orphan):
        path.write_bytes(b"some")
    with (locks / f"{etag}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process fetches it and has not moved for 15 s" in project.refused(stall=1.5)
    assert leftovers() == [held]
    project.run()
    assert not leftovers()
