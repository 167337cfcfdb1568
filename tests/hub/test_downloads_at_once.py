"""Downloads that are killed, or come in pairs: nothing is fetched twice, and nothing half is left."""

import fcntl
import hashlib
import os
import signal
from pathlib import Path

import pytest

from tests.hub_server import Fault, LoopbackHub
from tests.support.downloads import BASE, BIG, CONTENT, FILE, LIMIT, LORA, Project, fetched, leftovers, processes
from tests.support.repositories import PIPELINE
from tests.support.waiting import until

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
