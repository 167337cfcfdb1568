"""The Hub client's cache on this machine, read without a network, and of the client with its settings only.

Layout: huggingface.co/docs/huggingface_hub/guides/manage-cache, ``models--OWNER--NAME/snapshots/COMMIT/...``.
"""

from __future__ import annotations

from importlib.util import find_spec, module_from_spec
from itertools import pairwise
from pathlib import Path, PurePath
from types import ModuleType

from lora_fuse.errors import BadSource, MissingExtra, Rerun, naming_extras
from lora_fuse.recipe.records import Lock

NAMED = 3  # missing files that a message names
AGAIN = Rerun("download", force=True)


def client_settings() -> ModuleType:
    """The Hub client's own settings (`huggingface_hub.constants`), by its own rules, of the environment as it is now.

    The client reads the environment once, when it is imported; its rules are run anew here, which takes half a
    millisecond and imports nothing else of it.

    Raises:
        MissingExtra: the client is not installed.
    """
    with naming_extras("the Hub's cache"):
        spec = find_spec("huggingface_hub.constants")
    if spec is None or spec.loader is None:
        raise MissingExtra("huggingface_hub has no constants, so its cache is not known: pip install 'lora-fuse[hub]'")
    settings = module_from_spec(spec)
    spec.loader.exec_module(settings)
    return settings


def cache_dir() -> Path:
    """The Hub client's cache, where the client has it."""
    return Path(client_settings().HF_HUB_CACHE).absolute()


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
    missing = [name for name in sorted(lock.files) if not _is_file(root / name)]
    if missing:
        more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        raise BadSource(
            f"{', '.join(missing[:NAMED])}{more} of {lock.label} "
            f"{'is' if len(missing) == 1 else 'are'} not on this machine; run the download stage",
            rerun=AGAIN,
        )
    for name, record in sorted(lock.files.items()):
        size = (root / name).stat().st_size
        if size != record.size:
            raise BadSource(
                f"{name} of {lock.label} has {size} bytes, its lock says {record.size}; run the download stage",
                rerun=AGAIN,
            )
    return root


def other_content(lock: Lock, name: str, sha256: str | None) -> BadSource:
    """The error about a file that is not what its lock says, by its sha256; None where it is not there."""
    return BadSource(
        f"{name} of {lock.label} is not what was locked: its sha256 is {sha256}, the lock says "
        f"{lock.files[name].sha256}; run the download stage",
        rerun=AGAIN,
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no file can have, or a folder that may not be entered
        return False


def cached_from(path: PurePath) -> tuple[str | None, str | None]:
    """Repository id and name of a file that lies in the Hub client's cache; None and its name elsewhere."""
    for index, (part, below) in enumerate(pairwise(path.parts)):
        if part.startswith("models--") and below == "snapshots":
            return "/".join(part.split("--")[1:]), "/".join(path.parts[index + 3 :])
    return None, path.name


def cached_at(path: PurePath) -> str | None:
    """``repo@commit`` of a folder or file in the Hub client's cache, see `cached_from`; None elsewhere."""
    repo_id, _ = cached_from(path)
    commit = next((part for above, part in pairwise(path.parts) if above == "snapshots"), None)
    return f"{repo_id}@{commit}" if repo_id and commit else None
