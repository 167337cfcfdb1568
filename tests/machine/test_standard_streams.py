"""Laws of a process's streams: work whose output cannot be written is done all the same, and that is an exit code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lora_fuse
from lora_fuse import LoraInput
from tests.support import tiny

ROOT = Path(__file__).resolve().parents[2]
UNREADABLE = os.fsdecode(b"\x83\x89.safetensors")  # Shift-JIS


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return tiny.write_lora(tmp_path / "l.safetensors", tiny.lora_tensors()).rename(tmp_path / UNREADABLE)


def shell(place: Path, redirections: str, *arguments: object) -> subprocess.CompletedProcess[bytes]:
    """Run the command line with some of its streams closed or redirected."""
    command = ["sh", "-c", f'exec "$@" {redirections}', "sh", sys.executable, "-m", "lora_fuse", *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=place, env=env, capture_output=True, check=False, timeout=120)


@pytest.mark.parametrize(
    ("redirections", "said"),
    [
        (">&-", b"error: stdout cannot be written (Bad file descriptor); what was asked for is done\n"),
        (">/dev/full", b"error: stdout cannot be written (No space left on device); what was asked for is done\n"),
        ("<&- >&- 2>&-", b""),
    ],
)
def test_a_merge_is_whole_though_stdout_cannot_be_written(
    tmp_path: Path, base: Path, lora: Path, redirections: str, said: bytes
) -> None:
    done = shell(tmp_path, redirections, "fuse", base, "out", "--lora", lora)
    assert (done.returncode, done.stdout, done.stderr) == (2, b"", said)
    assert (tmp_path / "out.manifest.json").is_file()
    assert lora_fuse.verify(tmp_path / "out", base, [LoraInput("l", lora, 1.0)]).passed


def test_a_merge_is_whole_without_stderr_and_a_name_that_is_not_utf_8_is_escaped(
    tmp_path: Path, base: Path, lora: Path
) -> None:
    done = shell(tmp_path, "<&- 2>&-", "fuse", base, "out", "--lora", lora)
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"\udc83\udc89.safetensors at scale 1" in done.stdout
    assert json.loads((tmp_path / "out.manifest.json").read_text())["loras"][0]["name"] == r"\x83\x89"


def test_a_refusal_stays_one_without_stderr(tmp_path: Path, base: Path) -> None:
    done = shell(tmp_path, "2>/dev/full", "fuse", base, "out", "--lora", "missing.safetensors")
    assert (done.returncode, done.stdout, done.stderr) == (2, b"", b"")


def test_help_on_a_full_disk_has_no_traceback(tmp_path: Path) -> None:
    assert shell(tmp_path, ">/dev/full", "fuse", "--help").stderr == b""
