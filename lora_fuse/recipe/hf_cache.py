"""The Hub client's cache on this machine, read without the client and without a network.

Layout: huggingface.co/docs/huggingface_hub/guides/manage-cache, ``models--OWNER--NAME/snapshots/COMMIT/...``.
"""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path, PurePath

from lora_fuse.errors import BadSource, Rerun
from lora_fuse.recipe.records import Lock

NAMED = 3  # missing files that a message names


def cache_dir() -> Path:
    """The Hub client's cache: the client's rules, but read at each call and not at import."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub")).expanduser().absolute()


def repository_folder(repo_id: str) -> Path:
    """Folder of a repository in the cache."""
    return cache_dir() / _folder_name(repo_id)


def locks_folder(repo_id: str) -> Path:
    """Folder of the client's locks on a repository's files: `ETAG.lock`, held while the file is fetched."""
    return cache_dir() / ".locks" / _folder_name(repo_id)


def snapshot_folder(repo_id: str, commit: str) -> Path:
    """Folder that shows the files of a commit."""
    return repository_folder(repo_id) / "snapshots" / commit


def _folder_name(repo_id: str) -> str:
    return f"models--{repo_id.replace('/', '--')}"


def locate(lock: Lock) -> Path:
    """The folder on this machine that holds the files of a lock; uses no network and hashes nothing.

    Raises:
        BadSource: a file is missing or has another size.
    """
    root = Path(str(lock.path)) if lock.repo_id is None else snapshot_folder(lock.repo_id, str(lock.revision))
    missing = [name for name in sorted(lock.files) if not (root / name).is_file()]
    if missing:
        more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        raise BadSource(
            f"{', '.join(missing[:NAMED])}{more} of {lock.label} "
            f"{'is' if len(missing) == 1 else 'are'} not on this machine; run the download stage",
            rerun=Rerun("download", force=True),
        )
    for name, record in sorted(lock.files.items()):
        size = (root / name).stat().st_size
        if size != record.size:
            raise BadSource(
                f"{name} of {lock.label} has {size} bytes, its lock says {record.size}; run the download stage",
                rerun=Rerun("download", force=True),
            )
    return root


def cached_from(path: PurePath) -> tuple[str | None, str | None]:
    """Repository id and name of a file that lies in the Hub client's cache; None and its name elsewhere."""
    for index, (part, below) in enumerate(pairwise(path.parts)):
        if part.startswith("models--") and below == "snapshots":
            return "/".join(part.split("--")[1:]), "/".join(path.parts[index + 3 :])
    return None, path.name


def is_blob(path: PurePath) -> bool:
    """True for a file's own place in the Hub client's cache, to which snapshots link."""
    return path.parent.name == "blobs" and path.parent.parent.name.startswith("models--")


def cached_at(path: PurePath) -> str | None:
    """``repo@commit`` of a folder or file in the Hub client's cache, see `cached_from`; None elsewhere."""
    repo_id, _ = cached_from(path)
    commit = next((part for above, part in pairwise(path.parts) if above == "snapshots"), None)
    return f"{repo_id}@{commit}" if repo_id and commit else None
