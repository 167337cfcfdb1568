"""Publication of a merged checkpoint: stage everything in a pull request, compare, merge, compare again, tag.

Whatever a run leaves when it dies, the next one finds by the manifest's sha256 in the title of its pull request.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lora_fuse.errors import NoSpace, PublishRefused
from lora_fuse.hub.client import endpoint, token
from lora_fuse.hub.payload import Hashed, open_payload
from lora_fuse.hub.pull_request import PullRequest
from lora_fuse.hub.remote import RemoteCommit, RemoteRepository
from lora_fuse.machine import FileRecord, files, progress, text
from lora_fuse.recipe import Manifest, records

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Set as AbstractSet

    from lora_fuse.hub.payload import Addition, Payload


@dataclass(frozen=True, slots=True)
class Receipt:
    """Record of a publication, or of the reason why nothing was published.

    Attributes:
        reason: why nothing was published; None if it was.
        pull_request: number of the one that brought the bytes, None if they came another way.
        url: page of the commit.
        private: the visibility that the Hub reports.
        files: every file, the card among them.
        manifest_sha256: of the manifest's text.
    """

    schema: int
    status: Literal["published", "skipped"]
    reason: str | None
    repo_id: str | None
    commit: str | None
    tag: str | None
    pull_request: int | None
    url: str | None
    private: bool | None
    files: dict[str, FileRecord]
    manifest_sha256: str

    def __str__(self) -> str:
        subject = f": {self.repo_id}@{self.commit}" if self.reason is None else f", {self.reason}"
        return f"{self.status}{subject}"

    def write(self, path: Path) -> None:
        """Write the receipt, whole or not at all.

        Raises:
            NoSpace: it cannot be written, though it is true.
        """
        try:
            files.replace_text(path, text.redacted(records.to_json(self)))
        except OSError as error:
            raise NoSpace(
                f"{path} cannot be written ({error.strerror}), {self}; make room and publish again"
            ) from error

    @classmethod
    def skipped(cls, reason: str, manifest_sha256: str) -> Receipt:
        """The receipt of a publication that was not asked for."""
        return cls(records.SCHEMA, "skipped", reason, None, None, None, None, None, None, {}, manifest_sha256)


def publish(  # noqa: PLR0913 - each is a choice of its own, by keyword
    merged: Path,
    manifest: Manifest,
    card: str,
    beside: Mapping[str, Addition] | None = None,
    *,
    repo_id: str,
    private: bool = True,
    tag: str | None = None,
    message: str,
    hashed: Hashed = frozenset(),
    absent: AbstractSet[str] = frozenset(),
) -> Receipt:
    """Publish a merged checkpoint; the repository is created if it is not there.

    Args:
        merged: the folder that holds the manifest's files, and nothing else.
        manifest: what is published.
        card: the repository's README.md, front matter included.
        beside: files beside the manifest's, by POSIX path.
        repo_id: `owner/name`.
        private: whether only its owner may see the repository. An existing one keeps its visibility: if that is
            public and private is asked for, nothing is sent.
        tag: a name for the commit; None for none.
        message: title of the commit and, with the manifest's sha256, of the pull request.
        hashed: files that were hashed a moment ago, see `open_payload`.
        absent: the manifest's files that stay here.

    Raises:
        PublishRefused: there is no token, the files are not the manifest's, the repository cannot be had, is
            visible to more people than asked or holds other files, the tag is on another commit, somebody changed
            the same files meanwhile, or a file arrived as something else.
    """
    if token() is None:
        raise PublishRefused("publishing needs an access token; set HF_TOKEN to one that may write to " + repo_id)
    key = hashlib.sha256(records.to_json(manifest).encode()).hexdigest()
    with open_payload(merged, manifest, card, beside, hashed, absent) as payload:
        repository = RemoteRepository(repo_id)
        main = repository.open(private=private)
        repository.refuse_strangers(main, payload)
        tagged = repository.tagged(tag) if tag else None
        before = repository.read(tagged) if tagged and tagged != main.commit else None
        if before and not payload.differences(before.files):
            main = before  # published and tagged already; main has moved on since, as where variants share it
        elif payload.differences(main.files):
            repository.refuse_other_tag(tag or "", tagged, None)
            pull = PullRequest(repository, payload, main, key, text.redacted(message))
            main = pull.merge(pull.fill(), private=private)
        if tag:
            repository.tag(tag, main.commit)
        pulls = [pull.num for pull in repository.pulls(key) if pull.status == "merged"]
    url = f"{endpoint()}/{repo_id}/tree/{main.commit}"
    number = pulls[-1] if pulls else None
    sent = dict(payload.files)
    return Receipt(records.SCHEMA, "published", None, repo_id, main.commit, tag, number, url, main.private, sent, key)


def preview(  # noqa: PLR0913 - each is a choice of its own, by keyword
    merged: Path,
    manifest: Manifest,
    card: str,
    beside: Mapping[str, Addition] | None = None,
    *,
    repo_id: str | None,
    tag: str | None,
    hashed: Hashed = frozenset(),
    absent: AbstractSet[str] = frozenset(),
) -> str:
    """List every file that would be published with what would happen to it, and show the card; nothing is sent.

    The arguments are `publish`'s; `repo_id` is None if that is not known yet.

    Raises:
        PublishRefused: these files would not be published anywhere, or not beside what is there.
    """
    with open_payload(merged, manifest, card, beside, hashed, absent) as payload:
        remote, place = _look(repo_id)
        if repo_id and remote:
            RemoteRepository(repo_id).refuse_strangers(remote, payload)
        states = _states(payload, remote)
    sizes = {name: payload.files[name].size for name, state in states.items() if state != "same"}
    lines = [f"{states[name]:7} {record.size:>12} {record.sha256} {name}" for name, record in payload.files.items()]
    size = progress.human_bytes(sum(sizes.values()))
    kept = progress.human_bytes(sum(manifest.files[name].size for name in absent))
    lines += [f"a recipe: {len(absent)} files with the weights, {kept}, are not sent"] if absent else []
    how = f"{len(sizes)} of {len(states)} files, {size}, would be sent" if sizes else "nothing would be sent"
    tagged = f"; tag {tag}" if tag else ""
    return "\n".join([f"dry run: {place}", *lines, f"{how}{tagged}", "", "README.md:", "", card])


def _look(repo_id: str | None) -> tuple[RemoteCommit | None, str]:
    if repo_id is None:
        return None, "publish.repo_id is null, so nothing is compared"
    try:
        remote = RemoteRepository(repo_id).read()
    except PublishRefused as refusal:
        return None, f"to {repo_id}, which cannot be read, so nothing is compared ({refusal})"
    return remote, f"to {endpoint()}/{repo_id}, {'private' if remote.private else 'public'}, at {remote.commit}"


def _states(payload: Payload, remote: RemoteCommit | None) -> dict[str, str]:
    if remote is None:
        return dict.fromkeys(payload.files, "unknown")
    differing = payload.differences(remote.files)
    changed = {name: "changed" if name in remote.files else "new" for name in differing}
    return {name: changed.get(name, "same") for name in payload.files}
