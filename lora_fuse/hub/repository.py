"""A Hub repository at a commit: what is in it, as a shelf that files are taken from (`lora_fuse.hub.sources`)."""

from __future__ import annotations

import sys
import time
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_fuse.errors import BadSource
from lora_fuse.hub.client import client, endpoint
from lora_fuse.hub.error_texts import client_errors, is_passing
from lora_fuse.hub.sources import ExpectedFile
from lora_fuse.hub.transfer import Order, Transfers
from lora_fuse.recipe import License, hf_cache, sections, stated_licence

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from huggingface_hub import ModelInfo

PAUSES = (1.0, 2.0)  # seconds before the second and third try of a Hub in trouble


@dataclass(frozen=True, slots=True)
class Repository:
    """A Hub repository at a commit, as a shelf."""

    repo_id: str
    commit: str
    files: Mapping[str, ExpectedFile]
    transfers: Transfers
    license: License | None = None

    @property
    def label(self) -> str:
        """What a person would call it."""
        return f"{self.repo_id}@{self.commit}"

    def fetch(self, names: Iterable[str], *, again: bool = False) -> Path:
        """Have files in the cache; returns the folder of the commit.

        Raises:
            BadSource: they cannot be had.
            NoSpace: the disk has no room for them.
        """
        wanted = tuple(names)
        if wanted:
            self.transfers.fetch(Order(self.repo_id, self.commit, wanted, again))
        return hf_cache.snapshot_folder(self.repo_id, self.commit)


@contextmanager
def open_repository(repo_id: str, revision: str | None, how: sections.DownloadParams) -> Iterator[Repository]:
    """Resolve a branch, tag, commit or pull request (``refs/pr/N``) to its commit, and list that.

    Raises:
        BadSource: there is no such repository or revision, or it may not be seen.
    """
    label = f"{repo_id}@{revision or 'main'}"
    with client_errors(label, repo_id, BadSource):
        info = _info(repo_id, revision, how.stall_seconds)
    if info.sha is None:
        raise BadSource(f"{label}: {endpoint()} names no commit, so it cannot be pinned; use another Hub")
    card = vars(info.card_data) if info.card_data else {}
    with closing(Transfers(how)) as transfers:
        yield Repository(repo_id, info.sha, remote_files(info), transfers, stated_licence.license_of(card, "hub"))


def listing(repo_id: str, revision: str | None, timeout: float) -> tuple[str, dict[str, ExpectedFile]]:
    """The commit that a revision means now, and what is in it; asked once, nothing is fetched.

    Raises:
        BadSource: see `open_repository`.
    """
    label = f"{repo_id}@{revision or 'main'}"
    with client_errors(label, repo_id, BadSource):
        info = client().model_info(repo_id, revision=revision, files_metadata=True, timeout=timeout)
    return info.sha or "", remote_files(info)


def _info(repo_id: str, revision: str | None, timeout: float) -> ModelInfo:
    """The client asks for this only once, and without a time limit of its own."""
    from httpx2 import HTTPError

    for pause in PAUSES:
        try:
            return client().model_info(repo_id, revision=revision, files_metadata=True, timeout=timeout)
        except HTTPError as error:
            if not is_passing(error):
                raise
            first = (str(error) or type(error).__name__).splitlines()[0]
            print(f"download: {repo_id}: {first}; trying again", file=sys.stderr, flush=True)
            time.sleep(_wait(error, pause, timeout))
    return client().model_info(repo_id, revision=revision, files_metadata=True, timeout=timeout)


def _wait(error: Exception, pause: float, longest: float) -> float:
    """Seconds to wait: what the Hub asks for (``Retry-After``) within reason, or `pause`."""
    response = getattr(error, "response", None)
    asked = response.headers.get("Retry-After", "") if response is not None else ""
    return min(float(asked), longest) if asked.isdecimal() else pause


def remote_files(info: ModelInfo) -> dict[str, ExpectedFile]:
    """What a Hub says of every file of a repository, by POSIX path."""
    promises = {}
    for file in info.siblings or ():
        # An LFS file's blob id is that of its pointer, not of its content.
        sha256, blob_id = (file.lfs.sha256, None) if file.lfs else (None, file.blob_id)
        promises[file.rfilename] = ExpectedFile(file.size, sha256, blob_id)
    return promises
