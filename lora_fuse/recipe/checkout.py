"""The package's version and the state of the checkout that it runs from."""

from __future__ import annotations

import getpass
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lora_fuse.recipe.records import Tool

# What a build or an approval itself writes; that does not make the checkout a modified one. params.yaml and
# variants/params.yaml are compiled from conf/, and what they say is in the records.
LOCKS = (":!dvc.lock", ":!publish/dvc.lock", ":!variants/dvc.lock")
ROOT = Path(__file__).resolve().parents[2]  # the checkout, if this runs from one
BUILD_PRODUCTS = (*LOCKS, ":!params.yaml", ":!variants/params.yaml", ":!artifacts/golden")


def this_version() -> str:
    """The package's version; "unknown" where it runs from its folder and is not installed."""
    try:
        return version("lora-fuse")
    except PackageNotFoundError:
        return "unknown"


@cache
def this_tool() -> Tool:
    """Version, git commit and whether tracked files were modified; no commit outside a git checkout.

    Git is asked once: the code that works is what was imported, whatever lies in the checkout later.
    """
    number = this_version()
    commit = _git(ROOT, "rev-parse", "HEAD")
    if commit is None or not (ROOT / "pyproject.toml").is_file():
        return Tool(number)
    changes = _git(ROOT, "status", "--porcelain", "--untracked-files=no", "--", ".", *BUILD_PRODUCTS)
    return Tool(number, commit, bool(changes))


def modified_files(root: Path) -> list[str] | None:
    """The files of a checkout that no commit has, but for `BUILD_PRODUCTS`; None where there is no checkout."""
    listed = _git(root, "status", "--porcelain", "-uall", "--", ".", *BUILD_PRODUCTS)
    return None if listed is None else [line.split(maxsplit=1)[1] for line in listed.splitlines()]


def this_repository() -> str | None:
    """The address that this checkout was cloned from, without a name or password in it; None if there is none."""
    address = _git(ROOT, "config", "remote.origin.url")
    if not address or "://" not in address or address.startswith("file:"):
        host, colon, path = (address or "").rpartition("@")[2].partition(":")  # git@host:owner/name
        return f"https://{host}/{path.removesuffix('.git')}" if colon and "@" in str(address) else None
    scheme, _, rest = address.partition("://")
    host, _, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}/{path.removesuffix('.git')}"


def tracked(path: Path) -> Path:
    """The file by which git knows a file: itself, or the record of DVC, where it or a folder above is kept there."""
    kept = [Path(f"{above}.dvc") for above in (path, *path.parents)]
    return next((one for one in kept if one.exists()), path)


def commit_of(path: Path, root: Path) -> str | None:
    """The commit that last changed a file of the checkout at `root`; None where there is no git.

    It is "not committed" if no commit has the file as it is. The first commit of a shallow clone changed everything, so
    that it may have been an earlier one.
    """
    name = str(tracked(path))
    commit = _git(root, "log", "-1", "--format=%h%d", "--abbrev=12", "--", name)
    if commit is None:
        return None
    if not commit or _git(root, "status", "--porcelain", "--", name):
        return "not committed"
    return commit.split()[0] + (" or before" if "grafted" in commit else "")


def this_person(root: Path) -> str:
    """The person who runs this: as git knows them (``name <mail>``), or the system's user."""
    name = _git(root, "config", "user.name")
    mail = _git(root, "config", "user.email")
    return f"{name} <{mail}>" if name and mail else getpass.getuser()


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
