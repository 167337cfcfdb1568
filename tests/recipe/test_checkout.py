"""The commit of a file, as git knows it, whoever keeps the file itself."""

import os
import subprocess
from pathlib import Path

import pytest

from lora_fuse.recipe.checkout import commit_of

WHO = {f"GIT_{role}_{part}": "t@example.org" for role in ("AUTHOR", "COMMITTER") for part in ("NAME", "EMAIL")}


def git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=root, env={**os.environ, **WHO}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def commit(root: Path, name: str, content: str) -> str:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(content)
    git(root, "add", "-A")
    git(root, "commit", "-qm", name)
    return git(root, "rev-parse", "--short=12", "HEAD")


def test_a_file_is_of_the_commit_that_last_changed_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "checkout"
    root.mkdir()
    monkeypatch.chdir(root)
    golden, record = Path("golden/key/a.json"), Path("golden/key/b.json")
    assert commit_of(golden, root) is None
    git(root, "init", "-q")
    first = commit(root, "golden/key/a.json", "1")
    second = commit(root, "golden/key/b.json", "1")
    assert (commit_of(golden, root), commit_of(record, root)) == (first, second)
    record.write_text("2")
    assert commit_of(record, root) == "not committed"
    assert commit_of(Path("golden/key/c.json"), root) == "not committed"
    git(tmp_path, "clone", "-q", "--depth=1", root.as_uri(), "shallow")
    assert commit_of(golden, tmp_path / "shallow") == f"{second} or before"


def test_a_file_that_dvc_keeps_is_of_its_record_s_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    git(tmp_path, "init", "-q")
    commit(tmp_path, ".gitignore", "/golden/pocket/\n")
    kept = commit(tmp_path, "golden/pocket.dvc", "outs: []")
    (tmp_path / "golden/pocket/key").mkdir(parents=True)
    (tmp_path / "golden/pocket/key/a.json").write_text("{}")
    assert commit_of(Path("golden/pocket/key/a.json"), tmp_path) == kept
