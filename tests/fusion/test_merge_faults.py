"""What a merge survives: real processes, killed with SIGKILL, disks that fill up, files that change under way."""

import errno
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_fuse.cli import main
from tests.support.merges import hashes, left, run, start, write_coded_base


def kill_when(place: Path, finished: int) -> None:
    """Start a run and kill it when so many of its shards are marked as finished."""
    process = start(place)
    while process.poll() is None and len(list(place.glob(".out.partial-*/done/*.json"))) < finished:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("coded", [False, True], ids=["bfloat16", "codes"])
def test_a_killed_run_leaves_the_last_result_and_the_next_one_goes_on(place: Path, coded: bool) -> None:
    if coded:
        shutil.rmtree(place / "base")
        write_coded_base(place / "base")
    assert run(place)[0] == 0
    wanted = hashes(place / "out")
    assert run(place, "0.5")[0] == 0
    before = hashes(place / "out")
    kill_when(place, finished=2)
    assert hashes(place / "out") == before
    (work,) = place.glob(".out.partial-*/files")
    done = {
        path.name: path.stat().st_ino
        for path in work.iterdir()
        if (work.parent / "done" / f"{path.name}.json").exists()
    }
    assert len(done) >= 2
    assert run(place)[0] == 0
    assert hashes(place / "out") == wanted
    assert {name: (place / "out" / name).stat().st_ino for name in done} == done  # those very files, not made again
    assert left(place) == []


def test_a_finished_shard_that_was_damaged_is_made_again(place: Path) -> None:
    assert run(place)[0] == 0
    wanted = hashes(place / "out")
    assert run(place, "0.5")[0] == 0
    kill_when(place, finished=1)
    (mark, *_) = place.glob(".out.partial-*/done/*.json")
    with (mark.parents[1] / "files" / mark.stem).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    assert run(place)[0] == 0
    assert hashes(place / "out") == wanted


def test_other_inputs_do_not_take_over_what_is_left(place: Path) -> None:
    assert run(place, "0.5")[0] == 0
    wanted = hashes(place / "out")
    kill_when(place, finished=1)
    assert run(place, "0.5")[0] == 0
    assert hashes(place / "out") == wanted
    assert left(place) == []


@pytest.mark.parametrize("seed", range(3))
def test_a_kill_at_any_moment_leaves_the_old_result_or_the_new_one(place: Path, seed: int) -> None:
    assert run(place, "0.5")[0] == 0
    old, rng = hashes(place / "out"), random.Random(seed)
    begun = time.monotonic()
    assert run(place)[0] == 0
    seconds, new = time.monotonic() - begun, hashes(place / "out")
    assert run(place, "0.5")[0] == 0
    for _ in range(4):
        process = start(place)
        time.sleep(rng.uniform(0.5, 1.05) * seconds)
        process.kill()
        process.communicate()
        assert hashes(place / "out") in (old, new)
    assert run(place)[0] == 0
    assert hashes(place / "out") == new
    assert left(place) == []


def test_a_second_run_while_one_lives_says_so(place: Path) -> None:
    first = stopped(place)  # it lives, and holds the place
    code, said = run(place)
    os.kill(first.pid, signal.SIGCONT)
    first.communicate(timeout=120)
    assert (code, said.splitlines()[-1]) == (2, "error: another run is writing out; wait for it to end")
    assert first.returncode == 0


def stopped(place: Path) -> subprocess.Popen[str]:
    """A run that was stopped as it began to write."""
    process = start(place)
    while not list(place.glob(".out.partial-*/files/*")):
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGSTOP)
    return process


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda shard: os.truncate(shard, shard.stat().st_size - 100), "100 bytes early: it changed while it was read"),
        (os.utime, "changed while it was read; run again when nothing writes to it"),
        (lambda shard: shard.unlink(), "safetensors cannot be read (No such file or directory); check the disk"),
    ],
    ids=["truncated", "touched", "removed"],
)
def test_a_base_that_changes_under_way_is_one_clear_error(
    place: Path, change: Callable[[Path], None], said: str
) -> None:
    assert run(place, "0.5")[0] == 0
    before = hashes(place / "out")
    process = stopped(place)
    change(sorted((place / "base").glob("*.safetensors"))[-1])
    os.kill(process.pid, signal.SIGCONT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2, out + err
    assert err.splitlines()[-1].startswith("error: ")
    assert said in err.splitlines()[-1]
    assert hashes(place / "out") == before
    assert left(place) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda lora: lora.unlink(), "cannot be read (No such file"),
        (lambda lora: os.truncate(lora, 90_000), "changed while it was read"),
        (os.utime, "changed while it was read"),
    ],
    ids=["removed", "truncated", "touched"],
)
def test_a_lora_that_changes_under_way_is_one_clear_error(
    place: Path, change: Callable[[Path], None], said: str
) -> None:
    process = stopped(place)
    change(place / "l.safetensors")
    os.kill(process.pid, signal.SIGCONT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2, out + err
    assert err.splitlines()[-1].startswith("error: l.safetensors ")
    assert said in err.splitlines()[-1]
    assert not (place / "out").exists()
    assert left(place) == []


def test_a_disk_that_cannot_be_read_is_one_clear_error(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.chdir(place)
    monkeypatch.setattr(os, "preadv", broken)
    assert main(["fuse", "base", "out", "--lora", "l.safetensors", "--scale", "1.0"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"error: base/.*safetensors cannot be read \(Input/output error\); check the disk .*", error)
    assert not (place / "out").exists()
    assert left(place) == []


def test_a_disk_that_fills_up_under_way_is_one_clear_error(place: Path) -> None:
    """The kernel refuses to write more than 2 MB to a file, as it refuses a write to a full disk."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, 2 << 20))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    assert run(place, "0.5")[0] == 0
    before = hashes(place / "out")
    code, said = run(place, preexec_fn=limited)
    assert code == 2
    assert said.splitlines()[-1].startswith("error: cannot write out: File too large")
    assert "it is as it was" in said
    assert hashes(place / "out") == before
    assert left(place) == []
