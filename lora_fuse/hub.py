"""Bases and LoRAs pinned: a Hub repository at a commit, or a local folder, with every file's sha256.

The Hub client trusts its cache and the wire, so a lock is only ever made from bytes that were read back,
hashed here and compared with what the Hub says of them.

Invariants: no pickle is ever fetched; a lock that exists keeps its commit, however far its branch moves; what
is locked and whole on this machine needs no network; the token comes from `HF_TOKEN` and nowhere else.
"""

from __future__ import annotations

import errno
import os
import sys
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from lora_fuse.allowlist import is_pickle
from lora_fuse.errors import BadLora, BadSource, NoSpace, Refused
from lora_fuse.licences import license_of
from lora_fuse.records import FileRecord, License, Lock, Source
from lora_fuse.sources import Basket, Promise, examine, hashing, open_folder, take_pipeline

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from huggingface_hub import HfApi, ModelInfo

REMEDY = "run the download stage: dvc repro -f download"


def lock_base(source: Source, *, previous: Lock | None, offline: bool = False) -> Lock:
    """Pin a diffusers pipeline, and have its files on this machine.

    Taken are `model_index.json` and, of the component folders that it names, the text files and the
    safetensors weights: the shards that an index names, or the one file. Variants (fp16, …) stay behind.

    Args:
        source: where it is.
        previous: the lock of the last run; the same repository and revision keep its commit.
        offline: use no network: a repository must be locked and here already.

    Raises:
        BadSource: the source cannot be had, is no such pipeline, has weights only as pickles, or sends other
            bytes than its Hub promises, twice.
    """
    return _lock(source, previous, offline, take_pipeline)


def lock_lora(source: Source, filename: str, *, previous: Lock | None, offline: bool = False) -> Lock:
    """Pin one LoRA file, and have it on this machine.

    Args:
        source: the repository or folder that holds it.
        filename: its POSIX path in there; it must end in `.safetensors`.
        previous: the lock of the last run, as for `lock_base`.
        offline: use no network, as for `lock_base`.

    Raises:
        BadLora: the file is not safetensors by its name.
        BadSource: as in `lock_base`.
    """
    path = PurePosixPath(filename)
    if path.is_absolute() or ".." in path.parts:
        raise BadSource(f"{filename!r} leads out of {source.label}; name a file below it")
    if path.suffix != ".safetensors":
        kind = "a pickle, which can run code when it is loaded" if is_pickle(filename) else "not safetensors"
        raise BadLora(f"{filename!r} of {source.label} is {kind}; name a .safetensors file, or convert it")
    name = path.as_posix()
    if previous is not None and name not in previous.files:
        previous = replace(previous, files={})  # another file of the same repository: its commit stays
    return _lock(source, previous, offline, lambda basket: basket.take([name]))


def locate(lock: Lock) -> Path:
    """The folder on this machine that holds the files of a lock; uses no network and hashes nothing.

    Raises:
        BadSource: a file is missing or has another size.
    """
    root = _cached(lock) if lock.path is None else Path(lock.path)
    for name, record in sorted(lock.files.items()):
        try:
            size = (root / name).stat().st_size
        except OSError as error:
            raise BadSource(f"{name} of {lock.label} is not on this machine; {REMEDY}") from error
        if size != record.size:
            raise BadSource(f"{name} of {lock.label} has {size} bytes, its lock says {record.size}; {REMEDY}")
    return root


def verify_files(root: Path, files: Mapping[str, FileRecord]) -> None:
    """Hash every file again.

    Raises:
        BadSource: a file cannot be read, or has another size or sha256 than its record.
    """
    with hashing(sum(record.size for record in files.values())) as advance:
        for name, record in sorted(files.items()):
            found = examine(root / name, Promise(record.size, record.sha256), advance)
            if isinstance(found, str):
                raise BadSource(f"{name} in {root} is not what was locked: {found}; {REMEDY}")


def _lock(source: Source, previous: Lock | None, offline: bool, take: Callable[[Basket], None]) -> Lock:
    asked = (source.repo_id, source.path, source.revision)
    kept = previous if previous and asked == (previous.repo_id, previous.path, previous.requested) else None
    if source.repo_id is None:
        basket = Basket(open_folder(Path(str(source.path))))
    elif kept and kept.files and _is_whole(kept, complain=offline):
        return kept
    elif offline:
        raise BadSource(f"{source.label} is not locked yet, which needs the network; run once without offline")
    else:
        basket = Basket(_open_repository(source.repo_id, kept.revision if kept else source.revision))
    take(basket)
    records = dict(sorted(basket.records.items()))
    if kept and kept.repo_id:
        _refuse_other_bytes(records, kept)
    shelf = basket.shelf
    return Lock(source.repo_id, source.path, source.revision, shelf.commit, records, shelf.license)


def _is_whole(lock: Lock, *, complain: bool) -> bool:
    try:
        verify_files(locate(lock), lock.files)
    except BadSource:
        if complain:
            raise
        return False
    return True


def _refuse_other_bytes(records: Mapping[str, FileRecord], kept: Lock) -> None:
    for name in sorted(records.keys() & kept.files.keys()):
        got, locked = records[name].sha256, kept.files[name].sha256
        if got != locked:
            raise BadSource(
                f"{name} of {kept.label}: the Hub sends sha256 {got}, the lock says {locked}; "
                "the files of a commit never change, so find out why before you delete the lock"
            )


@dataclass(frozen=True, slots=True)
class _Repository:
    """A Hub repository at a commit, as a shelf."""

    repo_id: str
    commit: str
    files: Mapping[str, Promise]
    license: License | None = None

    @property
    def label(self) -> str:
        return f"{self.repo_id}@{self.commit}"

    def fetch(self, names: Iterable[str], *, again: bool = False) -> Path:
        names = list(names)
        total = sum(self.files[name].size or 0 for name in names)
        print(
            f"download: {len(names)} files, {total / 1e9:.3f} GB from {self.label}",
            file=sys.stderr,
            flush=True,
        )
        what = self.label if len(names) > 1 else f"{names[0]} of {self.label}"
        with client_errors(what, self.repo_id, BadSource), bars_on_a_terminal():
            return _snapshot(self.repo_id, self.commit, names, force_download=again)


def _open_repository(repo_id: str, revision: str | None) -> _Repository:
    label = f"{repo_id}@{revision or 'main'}"
    with client_errors(label, repo_id, BadSource):
        info = client().model_info(repo_id, revision=revision, files_metadata=True)
    if info.sha is None:
        raise BadSource(f"{label}: {endpoint()} names no commit, so it cannot be pinned; use another Hub")
    card = vars(info.card_data) if info.card_data else {}
    return _Repository(repo_id, info.sha, remote_files(info), license_of(card, "hub"))


def _cached(lock: Lock) -> Path:
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return _snapshot(str(lock.repo_id), str(lock.revision), lock.files, local_files_only=True)
    except LocalEntryNotFoundError as error:
        raise BadSource(f"{lock.label} is not whole on this machine; {REMEDY}") from error


def _snapshot(
    repo_id: str,
    commit: str,
    names: Iterable[str],
    *,
    force_download: bool = False,
    local_files_only: bool = False,
) -> Path:
    from huggingface_hub import snapshot_download

    folder = snapshot_download(
        repo_id,
        revision=commit,
        allow_patterns=[escape(name) for name in names],
        cache_dir=cache_dir(),
        endpoint=endpoint(),
        token=token() or False,
        force_download=force_download,
        local_files_only=local_files_only,
    )
    return Path(folder)


def remote_files(info: ModelInfo) -> dict[str, Promise]:
    """What a Hub says of every file of a repository, by POSIX path."""
    promises = {}
    for file in info.siblings or ():
        # An LFS file's blob id is that of its pointer, not of its content.
        sha256, blob_id = (file.lfs.sha256, None) if file.lfs else (None, file.blob_id)
        promises[file.rfilename] = Promise(file.size, sha256, blob_id)
    return promises


def endpoint() -> str:
    """The Hub to talk to: `HF_ENDPOINT`, or huggingface.co."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def token() -> str | None:
    """The access token, from `HF_TOKEN` only: a build does not use a login that happens to be stored."""
    return os.environ.get("HF_TOKEN") or None


def cache_dir() -> Path:
    """The Hub client's cache: the client's rules, but read at each call and not at import."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub")).expanduser()


def client() -> HfApi:
    """A Hub client for the endpoint and token of the environment."""
    from huggingface_hub import HfApi

    return HfApi(endpoint=endpoint(), token=token() or False, library_name="lora-fuse")


def bars_on_a_terminal() -> AbstractContextManager[object]:
    """Let the client show its progress bars on a terminal only."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    return nullcontext() if sys.stderr.isatty() else disable_progress_bars()


@contextmanager
def client_errors(what: str, repo_id: str, refusal: type[Refused]) -> Iterator[None]:
    """Turn whatever the Hub client raises into one `refusal`, which names `what` and the way out."""
    from httpx2 import HTTPError  # the client's HTTP library, whose errors it lets through

    try:
        yield
    # Xet raises plain RuntimeError, an ill-formed name ValueError; the rest is HTTPError or OSError.
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise NoSpace(f"{what}: the disk of {cache_dir()} is full; make room and run again") from error
        raise refusal(f"{what}: {_explain(error, repo_id)}") from error


def _explain(error: BaseException, repo_id: str) -> str:
    from huggingface_hub import errors

    while isinstance(error, (errors.LocalEntryNotFoundError, ValueError)) and error.__cause__ is not None:
        error = error.__cause__  # "not in the cache either" hides the reason
    page = f"{endpoint()}/{repo_id}"
    reasons: tuple[tuple[type[Exception], str], ...] = (
        (errors.HFValidationError, f"{repo_id!r} is no repository id; write owner/name"),
        (errors.GatedRepoError, f"the repository is gated; ask for access at {page}, then set HF_TOKEN"),
        (errors.DisabledRepoError, f"the repository is disabled; see {page}"),
        (
            errors.RepositoryNotFoundError,
            "no such repository, or a private one; check the name, or set HF_TOKEN",
        ),
        (errors.RevisionNotFoundError, f"no such revision; see {page}/tree/main for what there is"),
        (errors.EntryNotFoundError, f"no such file at this revision; see {page}/tree/main"),
        (errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE is set, and this is not on the machine; unset it once"),
    )
    for kind, reason in reasons:
        if isinstance(error, kind):
            return reason
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        renew = "renew HF_TOKEN" if token() else "set HF_TOKEN"
        known = {401: renew, 403: "give HF_TOKEN the right to do this", 412: "somebody else was faster, run again"}
        advice = known.get(status, "try again later")
        return f"{endpoint()} answered {status} ({error.server_message or first}); {advice}"
    without = ", if need be with HF_HUB_DISABLE_XET=1" if isinstance(error, RuntimeError) else ""  # Xet's own class
    return f"{type(error).__name__}: {first}; check the connection and run again{without}"
