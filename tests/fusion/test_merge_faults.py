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
from contextlib import chdir
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import pytest

from lora_fuse.cli import main
from tests.support.merges import hashes, left, run, start, write_base, write_coded_base, write_lora

SCALE, OLD = "1.0", "0.5"


@dataclass(frozen=True, slots=True)
class Fused:
    """A base, a LoRA and what lies at ``out``: the merge at scale 0.5. `new` is what one at 1.0 has."""

    place: Path
    old: dict[str, str]
    new: dict[str, str]
    seconds: float  # of the run that made `new`, in a process of its own

    @classmethod
    def of(cls, place: Path) -> Self:
        begun = time.monotonic()
        assert run(place, SCALE)[0] == 0
        seconds = time.monotonic() - begun
        new = hashes(place / "out")
        fuse(place, OLD)
        return cls(place, hashes(place / "out"), new, seconds)


def fuse(place: Path, scale: str = SCALE) -> None:
    """Run to the end, in this process."""
    with chdir(place):
        assert main(["fuse", "base", "out", "--lora", "l.safetensors", "--scale", scale]) == 0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Fused:
    place = tmp_path_factory.mktemp("place")
    write_base(place / "base")
    write_lora(place / "l.safetensors")
    return Fused.of(place)


@pytest.fixture
def fused(made: Fused, tmp_path: Path) -> Fused:
    """A copy of it, to be changed."""
    return replace(made, place=shutil.copytree(made.place, tmp_path / "place"))


@pytest.fixture
def place(made: Fused, tmp_path: Path) -> Path:
    """The same, with nothing at ``out``."""
    return shutil.copytree(made.place, tmp_path / "place", ignore=shutil.ignore_patterns("out", ".*"))


def kill_when(place: Path, finished: int) -> None:
    """Start a run and kill it when so many of its shards are marked as finished."""
    process = start(place)
    while process.poll() is None and len(list(place.glob(".out.partial-*/done/*.json"))) < finished:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("coded", [False, True], ids=["bfloat16", "codes"])
def test_a_killed_run_leaves_the_last_result_and_the_next_one_goes_on(fused: Fused, coded: bool) -> None:
    place = fused.place
    if coded:
        shutil.rmtree(place / "out")
        shutil.rmtree(place / "base")
        write_coded_base(place / "base")
        fused = Fused.of(place)
    kill_when(place, finished=2)
    assert hashes(place / "out") == fused.old
    (work,) = place.glob(".out.partial-*/files")
    done = {
        path.name: path.stat().st_ino
        for path in work.iterdir()
        if (work.parent / "done" / f"{path.name}.json").exists()
    }
    assert len(done) >= 2
    fuse(place)
    assert hashes(place / "out") == fused.new
    assert {name: (place / "out" / name).stat().st_ino for name in done} == done  # those very files, not made again
    assert left(place) == []


def test_a_finished_shard_that_was_damaged_is_made_again(fused: Fused) -> None:
    kill_when(fused.place, finished=1)
    (mark, *_) = fused.place.glob(".out.partial-*/done/*.json")
    with (mark.parents[1] / "files" / mark.stem).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    fuse(fused.place)
    assert hashes(fused.place / "out") == fused.new


def test_other_inputs_do_not_take_over_what_is_left(fused: Fused) -> None:
    kill_when(fused.place, finished=1)
    fuse(fused.place, OLD)
    assert hashes(fused.place / "out") == fused.old
    assert left(fused.place) == []


def test_a_kill_at_any_moment_leaves_the_old_result_or_the_new_one(fused: Fused) -> None:
    place, rng = fused.place, random.Random(0)
    for _ in range(12):
        process = start(place)
        time.sleep(rng.uniform(0.5, 1.05) * fused.seconds)
        process.kill()
        process.communicate()
        assert hashes(place / "out") in (fused.old, fused.new)
    fuse(place)
    assert hashes(place / "out") == fused.new
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
    fused: Fused, change: Callable[[Path], None], said: str
) -> None:
    place = fused.place
    process = stopped(place)
    change(sorted((place / "base").glob("*.safetensors"))[-1])
    os.kill(process.pid, signal.SIGCONT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2, out + err
    assert err.splitlines()[-1].startswith("error: ")
    assert said in err.splitlines()[-1]
    assert hashes(place / "out") == fused.old
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


def test_a_disk_that_fills_up_under_way_is_one_clear_error(fused: Fused) -> None:
    """The kernel refuses to write more than 2 MB to a file, as it refuses a write to a full disk."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, 2 << 20))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    place = fused.place
    code, said = run(place, preexec_fn=limited)
    assert code == 2
    assert said.splitlines()[-1].startswith("error: cannot write out: File too large")
    assert "it is as it was" in said
    assert hashes(place / "out") == fused.old
    assert left(place) == []
