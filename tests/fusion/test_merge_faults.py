"""What a merge survives: real processes, killed with SIGKILL, disks that fill up, files that change under way."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lora_fuse.cli import main
from tests import tiny

SHARDS = 6
LINEAR = (1024, 1024)


def write_base(folder: Path) -> Path:
    """A component of six shards, 4 MB each, one linear in each of them a target."""
    rng = np.random.default_rng(1)
    tensors: dict[str, tiny.Array] = {}
    for block in range(SHARDS):
        tensors[f"blocks.{block}.to_q.weight"] = rng.standard_normal(LINEAR).astype(tiny.BF16)
        tensors[f"blocks.{block}.to_r.weight"] = rng.standard_normal(LINEAR).astype(tiny.BF16)
    return tiny.write_component(folder, tensors, SHARDS)


def write_lora(path: Path) -> Path:
    rng = np.random.default_rng(2)
    tensors = {}
    for block in range(SHARDS):
        tensors[f"blocks.{block}.to_q.lora_down.weight"] = rng.standard_normal((8, 1024)).astype(np.float32)
        tensors[f"blocks.{block}.to_q.lora_up.weight"] = rng.standard_normal((1024, 8)).astype(np.float32)
    return tiny.write_lora(path, tensors)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_base(tmp_path / "base")
    write_lora(tmp_path / "l.safetensors")
    return tmp_path


def start(place: Path, scale: str = "1.0", **how: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "lora_fuse", "fuse", "base", "out", "--lora", "l.safetensors", "--scale", scale]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=place, env=env, text=True, **pipes, **how)  # type: ignore[call-overload, no-any-return]


def run(place: Path, scale: str = "1.0", **how: object) -> tuple[int, str]:
    process = start(place, scale, **how)
    out, err = process.communicate(timeout=120)
    return process.returncode, out + err


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def left(place: Path) -> list[str]:
    return sorted(path.name for path in place.glob(".out.*") if path.name != ".out.lock")


def kill_when(place: Path, finished: int) -> None:
    """Start a run and kill it when so many of its shards are marked as finished."""
    process = start(place)
    while process.poll() is None and len(list(place.glob(".out.partial-*/done/*.json"))) < finished:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_a_killed_run_leaves_the_last_result_and_the_next_one_goes_on(place: Path) -> None:
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
        (lambda lora: os.truncate(lora, 90_000), "early"),
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
