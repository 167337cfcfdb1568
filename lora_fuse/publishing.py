"""A merged checkpoint published: exactly the manifest's files and a card, in one commit, then read back.

Invariants: nothing is sent that the manifest does not name, or that is not what it says; success is
only claimed of a commit whose every file the Hub reports with the right hash; publishing what is there already
sends nothing.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

from lora_fuse import hub
from lora_fuse.allowlist import is_pickle
from lora_fuse.errors import PublishRefused
from lora_fuse.records import SCHEMA, FileRecord, Manifest, to_json
from lora_fuse.sources import Promise, examine, hashing

if TYPE_CHECKING:
    from collections.abc import Mapping

CARD = "README.md"


@dataclass(frozen=True, slots=True)
class Receipt:
    """What was published where, or why nothing was; `private` is what the Hub says, `files` has the card."""

    schema: int
    status: Literal["published", "skipped"]
    reason: str | None
    repo_id: str | None
    commit: str | None
    url: str | None
    private: bool | None
    files: dict[str, FileRecord]
    manifest_sha256: str


@dataclass(frozen=True, slots=True)
class _Remote:
    """A repository as the Hub reports it at a commit."""

    commit: str
    private: bool
    files: Mapping[str, Promise]


def skipped(reason: str, manifest_sha256: str) -> Receipt:
    """The receipt of a publication that was not asked for."""
    return Receipt(SCHEMA, "skipped", reason, None, None, None, None, {}, manifest_sha256)


def publish(
    merged: Path,
    manifest: Manifest,
    card: str,
    *,
    repo_id: str,
    private: bool = True,
    message: str,
    additional: Mapping[str, tuple[Path, FileRecord]] | None = None,
) -> Receipt:
    """Publish a merged checkpoint; the repository is created if it is not there.

    Args:
        merged: the folder that holds the manifest's files.
        manifest: what is published.
        card: the repository's README.md, front matter included.
        repo_id: `owner/name`.
        private: whether only its owner may see the repository. An existing one keeps its visibility: if that is
            public and private is asked for, nothing is sent.
        message: title of the commit.
        additional: files beside the manifest's, by POSIX path: where each lies, and what it has to be.

    Raises:
        PublishRefused: there is no token, the files are not the manifest's, the repository cannot be had, is
            visible to more people than asked or holds other weights, or what arrived is not what was sent.
    """
    if hub.token() is None:
        raise PublishRefused("publishing needs an access token; set HF_TOKEN to one that may write to " + repo_id)
    with TemporaryDirectory() as folder:
        paths = _local_files(merged, manifest)
        paths[CARD] = Path(folder, CARD)
        paths[CARD].write_text(card, encoding="utf-8")
        expected = {name: FileRecord(file.size, file.sha256) for name, file in manifest.files.items()}
        for name, (path, record) in (additional or {}).items():
            _refuse_pickle(name)
            if name in paths:
                raise PublishRefused(f"{name} is both in the manifest and beside it; fuse again")
            paths[name], expected[name] = path, record
        files = _hashed(paths, expected)
        remote = _open(repo_id, private=private)
        _refuse_foreign_weights(remote, files, repo_id)
        if differing := _differing(paths, files, remote):
            remote = _send({name: paths[name] for name in differing}, remote, repo_id, message)
        if differing := _differing(paths, files, remote):
            name = min(differing)
            raise PublishRefused(f"{repo_id}@{remote.commit}: {name} {differing[name]}; publish again")
    return Receipt(
        SCHEMA,
        "published",
        None,
        repo_id,
        remote.commit,
        f"{hub.endpoint()}/{repo_id}/tree/{remote.commit}",
        remote.private,
        files,
        hashlib.sha256(to_json(manifest).encode()).hexdigest(),
    )


def _local_files(merged: Path, manifest: Manifest) -> dict[str, Path]:
    """The files to send by their POSIX path; only what lies in `merged` itself is sent."""
    root, paths = merged.resolve(), {}
    for name in sorted(manifest.files):
        path = merged / name
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or not path.resolve().is_relative_to(root):
            raise PublishRefused(f"{name} leads out of {merged}; only files in there are published, fuse again")
        _refuse_pickle(name)
        if name == CARD:
            raise PublishRefused(f"the manifest names {CARD}, which is where the card goes; fuse again")
        paths[name] = path
    return paths


def _refuse_pickle(name: str) -> None:
    if is_pickle(name):
        raise PublishRefused(f"{name} is a pickle, which runs code when it is loaded; it is not published")


def _hashed(paths: Mapping[str, Path], expected: Mapping[str, FileRecord]) -> dict[str, FileRecord]:
    """Hash every file, and compare with the manifest where that says something."""
    records = {}
    with hashing(sum(record.size for record in expected.values())) as advance:
        for name, path in sorted(paths.items()):
            promise = Promise(expected[name].size, expected[name].sha256) if name in expected else Promise()
            found = examine(path, promise, advance)
            if isinstance(found, str):
                raise PublishRefused(f"{path} is not what the manifest says: {found}; fuse and check again")
            records[name] = found
    return records


def _open(repo_id: str, *, private: bool) -> _Remote:
    with hub.client_errors(f"publishing to {repo_id}", repo_id, PublishRefused):
        hub.client().create_repo(repo_id, private=private, exist_ok=True)
    remote = _read(repo_id, None)
    if private and not remote.private:  # `exist_ok` takes a repository as it is
        raise PublishRefused(
            f"{repo_id} is public, and a private repository is asked for; make it private in its settings at "
            f"{hub.endpoint()}/{repo_id}/settings, name another one, or set publish.private to false"
        )
    return remote


def _read(repo_id: str, revision: str | None) -> _Remote:
    with hub.client_errors(f"reading {repo_id} back", repo_id, PublishRefused):
        info = hub.client().model_info(repo_id, revision=revision, files_metadata=True)
    return _Remote(str(info.sha), bool(info.private), hub.remote_files(info))


def _refuse_foreign_weights(remote: _Remote, files: Mapping[str, FileRecord], repo_id: str) -> None:
    """Weights that are there and not ours would be loaded, or mistaken, for part of what is published."""
    for name in sorted(remote.files.keys() - files.keys()):
        if is_pickle(name) or name.endswith(".safetensors"):
            raise PublishRefused(
                f"{repo_id} holds {name}, which is no part of this checkpoint; "
                "delete it there, or name another repository"
            )


def _differing(paths: Mapping[str, Path], files: Mapping[str, FileRecord], remote: _Remote) -> dict[str, str]:
    """What is not there as it is here, with a few words on how it differs."""
    found = {name: _difference(paths[name], record, remote.files.get(name)) for name, record in files.items()}
    return {name: words for name, words in found.items() if words}


def _difference(path: Path, record: FileRecord, there: Promise | None) -> str | None:
    if there is None:
        return "is not there"
    if there.sha256:
        same = (there.size, there.sha256) == (record.size, record.sha256)
        return None if same else f"has sha256 {there.sha256} there, {record.sha256} here"
    found = examine(path, there, lambda _: None)  # git knows it by another hash
    return f"differs: {found} there" if isinstance(found, str) else None


def _send(paths: Mapping[str, Path], before: _Remote, repo_id: str, message: str) -> _Remote:
    """Commit files on top of `before`, and read the commit back; its answer may be lost though it landed."""
    from huggingface_hub import CommitOperationAdd

    operations = [CommitOperationAdd(name, str(path)) for name, path in sorted(paths.items())]
    total = sum(path.stat().st_size for path in paths.values())
    print(f"publish: {len(paths)} files, {total / 1e9:.3f} GB to {repo_id}", file=sys.stderr, flush=True)
    try:
        with hub.client_errors(f"publishing to {repo_id}", repo_id, PublishRefused), hub.bars_on_a_terminal():
            made = hub.client().create_commit(repo_id, operations, commit_message=message, parent_commit=before.commit)
    except PublishRefused:
        after = _read(repo_id, None)
        if after.commit == before.commit:
            raise
        return after
    return _read(repo_id, made.oid)
