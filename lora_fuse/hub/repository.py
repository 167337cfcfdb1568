"""A Hub repository at a commit as a source of files (`lora_fuse.hub.sources`)."""

from __future__ import annotations

from contextlib import closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from lora_fuse.errors import BadSource
from lora_fuse.hub.client import client, endpoint
from lora_fuse.hub.retry import DOWNLOAD
from lora_fuse.hub.sources import Arrived, ExpectedFile, FileSource
from lora_fuse.hub.transfer import FetchOrder, Transfers
from lora_fuse.recipe import License, hf_cache, sections, stated_licence

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from huggingface_hub import ModelInfo


class RepositoryListing(NamedTuple):
    """A revision as the Hub lists it: its commit, its licence, and its files by POSIX path."""

    commit: str
    license: License | None
    files: Mapping[str, ExpectedFile]


@contextmanager
def open_repository(repo_id: str, revision: str | None, transfer: sections.DownloadParams) -> Iterator[FileSource]:
    """Resolve a branch, tag, commit or pull request (``refs/pr/N``) to its commit, and list that.

    Raises:
        BadSource: there is no such repository or revision, or the token may not read it.
    """
    with closing(Transfers(transfer)) as transfers:
        transfers.start()  # while the Hub is asked
        commit, stated, files = list_repository(repo_id, revision, timeout=transfer.stall_seconds)

        def fetch(names: Iterable[str], again: bool, arrived: Arrived) -> Path:
            folder = hf_cache.snapshot_folder(repo_id, commit)
            if wanted := {name: files[name].size for name in names}:
                transfers.fetch(FetchOrder(repo_id, commit, wanted, again), partial(arrived, folder))
            return folder

        yield FileSource(f"{repo_id}@{commit}", commit, files, stated, fetch)


def list_repository(repo_id: str, revision: str | None, *, timeout: float, once: bool = False) -> RepositoryListing:
    """List what a revision (None for the default branch) holds now; no file is fetched.

    An answer may take `timeout` seconds; `once` asks a Hub in trouble no second time.

    Raises:
        BadSource: see `open_repository`; also if the Hub names no commit.
    """
    label = f"{repo_id}@{revision or 'main'}"
    ask = DOWNLOAD.call if once else DOWNLOAD.ask
    info = ask(
        label, repo_id, lambda: client().model_info(repo_id, revision=revision, files_metadata=True), within=timeout
    )
    if info.sha is None:
        raise BadSource(f"{label}: {endpoint()} names no commit, so it cannot be pinned; use another Hub")
    card = vars(info.card_data) if info.card_data else {}
    return RepositoryListing(info.sha, stated_licence.license_of(card, "hub"), remote_files(info))


def remote_files(info: ModelInfo) -> dict[str, ExpectedFile]:
    """Size and hash of every file of a repository as the Hub lists them, by POSIX path."""
    files = {}
    for file in info.siblings or ():
        # An LFS file's blob id is that of its pointer, not of its content.
        sha256 = file.lfs.sha256 if file.lfs else None
        blob_id = None if file.lfs else file.blob_id
        files[file.rfilename] = ExpectedFile(file.size, sha256, blob_id)
    return files
