"""Downloads to a disk that is too small, or fills up under way."""

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub_server import Fault, LoopbackHub
from tests.support.downloads import CONTENT, FILE, LIMIT, LORA, Project, fetched
from tests.support.waiting import until


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    monkeypatch.setenv("HF_HUB_CACHE", str(folder / "hub"))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


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
