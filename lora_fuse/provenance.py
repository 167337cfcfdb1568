"""What built this: the package's version and the state of the checkout that it runs from."""

from __future__ import annotations

import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lora_fuse.records import Tool

# Files that a build itself writes; changing them does not make the checkout a modified one.
BUILD_PRODUCTS = (":!dvc.lock", ":!publish/dvc.lock")


def this_tool() -> Tool:
    """Version, git commit and whether tracked files were modified; no commit outside a git checkout."""
    try:
        number = version("lora-fuse")
    except PackageNotFoundError:
        number = "unknown"
    root = Path(__file__).resolve().parents[1]
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None or not (root / "pyproject.toml").is_file():
        return Tool(number)
    changes = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", *BUILD_PRODUCTS)
    return Tool(number, commit, bool(changes))


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
