"""The project without its git repository, as an archive or a copy has it: DVC does without git there."""

import os
import re
import subprocess
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "DVC_NO_ANALYTICS": "1", "GIT_CEILING_DIRECTORIES": str(cwd.parent)}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """All tracked files as they are, packed by git as for a release."""
    changed = run("git", "stash", "create", cwd=ROOT).stdout.strip()
    packed = run("git", "archive", "--output", str(tmp_path / "a.tar"), changed or "HEAD", cwd=ROOT)
    assert packed.returncode == 0, packed.stderr
    with tarfile.open(tmp_path / "a.tar") as file:
        file.extractall(tmp_path / "archive", filter="data")
    return tmp_path / "archive"


def makes_do() -> str:
    """The line of the Makefile's `repro` that lets DVC do without git."""
    (line,) = re.findall(r"^\t@(.*core\.no_scm.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    return str(line)


def test_dvc_works_in_an_archive(archive: Path) -> None:
    listed = run("dvc", "stage", "list", "--name-only", cwd=archive)
    assert listed.stdout.split()[:2] == ["download", "fuse"], listed.stderr


def test_make_lets_dvc_work_in_a_copy_and_changes_nothing_in_a_checkout(archive: Path) -> None:
    config = (ROOT / ".dvc/config").read_text(encoding="utf-8")
    (archive / ".dvc/config").write_text(config, encoding="utf-8")  # as `cp` copies it
    refused = run("dvc", "stage", "list", cwd=archive)
    assert (refused.returncode != 0, "is not a git repository" in refused.stderr) == (True, True)
    run("git", "init", "--quiet", cwd=archive)
    assert run("sh", "-c", makes_do(), cwd=archive).returncode == 0
    assert not (archive / ".dvc/config.local").exists()
    (archive / ".git").rename(archive.parent / "elsewhere")
    assert run("sh", "-c", makes_do(), cwd=archive).returncode == 0
    assert run("dvc", "stage", "list", cwd=archive).returncode == 0
