"""The algorithm: stage everything in a pull request, compare, merge, compare again, tag.

Whatever a run leaves when it dies, the next one finds by the manifest's sha256 in the title of its pull request. What
was sent is known by what the Hub lists, never by an answer: answers get lost.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_fuse.errors import PublishRefused
from lora_fuse.hub.client import endpoint, token
from lora_fuse.hub.payload import Payload, open_payload
from lora_fuse.hub.receipt import Receipt
from lora_fuse.hub.remote import Remote, Repository
from lora_fuse.hub.retry import DELAYS, bound_requests, wait
from lora_fuse.hub.upload import CommitFailed, CommitJob, send
from lora_fuse.machine import progress
from lora_fuse.recipe import Manifest, records

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lora_fuse.hub.payload import Addition

BATCH = 4 << 30  # bytes of a commit, if a file is not larger by itself: a run that dies loses no more than that


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
) -> Receipt:
    """Publish a merged checkpoint; the repository is created if it is not there.

    Args:
        merged: the folder that holds the manifest's files, and nothing else.
        manifest: what is published.
        card: the repository's README.md, front matter included.
        beside: files beside the manifest's, by POSIX path: where each lies, and what it has to be.
        repo_id: `owner/name`.
        private: whether only its owner may see the repository. An existing one keeps its visibility: if that is
            public and private is asked for, nothing is sent.
        tag: a name for the commit; None for none.
        message: title of the commit and, with the manifest's sha256, of the pull request.

    Raises:
        PublishRefused: there is no token, the files are not the manifest's, the repository cannot be had, is
            visible to more people than asked or holds other weights, the tag is on another commit, somebody changed
            the same files meanwhile, or what arrived is not what was sent.
    """
    if token() is None:
        raise PublishRefused("publishing needs an access token; set HF_TOKEN to one that may write to " + repo_id)
    manifest_sha256 = hashlib.sha256(records.to_json(manifest).encode()).hexdigest()
    with open_payload(merged, manifest, card, beside) as ours:
        bound_requests()
        repository = Repository(repo_id)
        main = repository.open(private=private)
        repository.refuse_foreign_weights(main, ours)
        held = repository.tagged(tag) if tag else None
        before = repository.read(held) if held and held != main.commit else None
        if before and not ours.differences(before.files):
            main = before  # published and tagged already; main has moved on since, as where variants share it
        elif ours.differences(main.files):
            repository.refuse_other_tag(tag or "", held, None)
            staging = Staging(repository, ours, main, manifest_sha256, message)
            main = staging.merge(staging.fill(), private=private)
        if tag:
            repository.tag(tag, main.commit)
        merged_pulls = [pull.num for pull in repository.pulls(manifest_sha256) if pull.status == "merged"]
    return Receipt(
        records.SCHEMA,
        "published",
        None,
        repo_id,
        main.commit,
        tag,
        merged_pulls[-1] if merged_pulls else None,
        f"{endpoint()}/{repo_id}/tree/{main.commit}",
        main.private,
        dict(ours.files),
        manifest_sha256,
    )


@dataclass(frozen=True, slots=True)
class Staging:
    """A pull request of these bytes: found, or opened, filled and merged.

    `main` is what it was when this run began, `key` the manifest's sha256.
    """

    repository: Repository
    ours: Payload
    main: Remote
    key: str
    message: str

    def fill(self) -> int:
        """Have a pull request with every file on it as it is here; returns its number.

        Raises:
            PublishRefused: it cannot be had, or a file arrived as something else.
        """
        number, sent, failures, xet = self._find(), set[str](), 0, True
        while True:
            there = self.repository.read(f"refs/pr/{number}") if number else self.main
            missing = self.ours.differences(there.files)
            if number and not missing:
                return number
            if wrong := sorted(sent & missing.keys()):
                what = f"{self.repository.repo_id}@{there.commit}: {wrong[0]} {missing[wrong[0]]}"
                raise PublishRefused(f"{what}; pull request {number} is not merged; publish again")
            names = self._batch(sorted(missing))
            try:
                number = send(self._shipment(names, number, there), xet=xet) or number or self._find()
                sent, failures = sent | set(names), 0
            except CommitFailed as failure:
                found = number or self._find()
                if found and (number is None or self.repository.read(f"refs/pr/{found}").commit != there.commit):
                    number = found  # it landed, and only the answer was lost
                elif failure.over_xet and xet:
                    xet = False
                    print(f"publish: {failure}; once more without Xet", file=sys.stderr, flush=True)
                elif failure.pause is None or failures == len(DELAYS):
                    raise
                else:
                    wait(max(failure.pause, DELAYS[failures]), str(failure))
                    failures += 1

    def merge(self, number: int, *, private: bool) -> Remote:
        """Merge the pull request, unless somebody has changed the same files meanwhile; returns what `main` is then.

        Raises:
            PublishRefused: somebody has, or what `main` is then is not what is here.
        """
        now = self.repository.read()
        self.repository.refuse_public(now, private=private)
        self.repository.refuse_foreign_weights(now, self.ours)
        self._refuse_overwriting(now)
        try:
            self.repository.merge(number)
        except PublishRefused:
            now = self.repository.read()
            if self.ours.differences(now.files):
                raise
            return now  # another run has published the same
        now = self.repository.read()
        self.repository.refuse_foreign_weights(now, self.ours)
        if differing := self.ours.differences(now.files):
            name = min(differing)
            raise PublishRefused(
                f"{self.repository.repo_id}@{now.commit}: {name} {differing[name]} after pull request {number} was "
                "merged; publish again"
            )
        return now

    def _refuse_overwriting(self, now: Remote) -> None:
        touched = [name for name in sorted(self.ours.files) if now.files.get(name) != self.main.files.get(name)]
        if touched and self.ours.differences(now.files):
            raise PublishRefused(
                f"{self.repository.repo_id}: somebody changed {touched[0]} on main meanwhile (commit {now.commit}, was "
                f"{self.main.commit}); nothing was overwritten: look at it, then publish again"
            )

    def _find(self) -> int | None:
        """Our open pull request of these bytes. One that would bring more, or that `main` has overtaken, is closed."""
        for pull in self.repository.pulls(self.key):
            if pull.status not in ("open", "draft"):
                continue
            there = self.repository.read(f"refs/pr/{pull.num}")
            if self._others(there) == self._others(self.main) and not pull.conflicting_files:
                return pull.num
            self.repository.close(pull.num, "Closed by lora-fuse: main has moved on since; a new one takes its place.")
        return None

    def _others(self, remote: Remote) -> dict[str, object]:
        """What is not ours, but for the file in which the Hub notes by itself what is large."""
        return {name: one for name, one in self.ours.strangers(remote.files).items() if name != ".gitattributes"}

    def _batch(self, names: list[str]) -> list[str]:
        """The first of these files that make up a commit."""
        size, taken = 0, 0
        for name in names:
            size += self.ours.files[name].size
            if taken and size > BATCH:
                break
            taken += 1
        return names[:taken]

    def _shipment(self, names: list[str], number: int | None, there: Remote) -> CommitJob:
        total = sum(self.ours.files[name].size for name in names)
        files = "file" if len(names) == 1 else "files"
        where = f"pull request {number}" if number else "a new pull request"
        what = f"publish: {len(names)} {files}, {progress.human_bytes(total)} to {where} of {self.repository.repo_id}"
        progress.log(what)
        return CommitJob(
            self.repository.repo_id,
            f"refs/pr/{number}" if number else None,
            there.commit,
            f"{self.message}, manifest {self.key}",
            "Merged by lora-fuse itself when every file is here as the manifest says.",
            {name: str(self.ours.paths[name]) for name in names},
        )
