"""A pull request as the staging place of a publication: filled commit by commit, compared, merged, compared again.

What has arrived is known by what the Hub lists, never by an answer: answers get lost.
"""

from __future__ import annotations

import sys
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_fuse.errors import PublishRefused
from lora_fuse.hub.client import is_without_xet
from lora_fuse.hub.retry import DELAYS, PUBLISH, silence
from lora_fuse.hub.wire.pace import TOO_SLOW, Pace
from lora_fuse.hub.worker_process import AttemptFailed, WorkerProcess
from lora_fuse.machine import progress, text

if TYPE_CHECKING:
    from lora_fuse.hub.payload import Payload
    from lora_fuse.hub.remote import RemoteCommit, RemoteRepository

BATCH = 4 << 30  # bytes of a commit, if a file is not larger by itself: a run that dies loses no more than that


@dataclass(frozen=True, slots=True)
class PullRequest:
    """The pull request that brings a payload: found, or opened, filled and merged."""

    repository: RemoteRepository
    payload: Payload
    main: RemoteCommit  # as it was when this run began
    key: str  # the manifest's sha256, by which a later run finds the pull request
    message: str  # title of its commits

    def fill(self) -> int:
        """Have every file on the pull request as it is here; returns its number.

        Raises:
            PublishRefused: that did not work, or a file arrived as something else.
        """
        number = self._find()
        sent: set[str] = set()
        failures = 0
        xet = not is_without_xet()
        while True:
            remote = self.repository.read(f"refs/pr/{number}") if number else self.main
            missing = self.payload.differences(remote.files)
            if number and not missing:
                return number
            if altered := sent & missing.keys():
                name = min(altered)
                raise PublishRefused(
                    f"{self.repository.repo_id}@{remote.commit}: {name} {missing[name]}; pull request {number} is not "
                    "merged; publish again"
                )
            names = self._batch(sorted(missing))
            try:
                number = self._send(names, number, remote, xet=xet) or number or self._find()
                sent |= set(names)
                failures = 0
            except AttemptFailed as failure:
                opened = number or self._find()
                landed = opened and (not number or self.repository.read(f"refs/pr/{opened}").commit != remote.commit)
                lighter = failure.without_xet and xet
                if failures == len(DELAYS) or not (landed or lighter or failure.pause is not None):
                    raise PublishRefused(str(failure)) from failure
                if landed:
                    number = opened  # only the answer was lost
                elif lighter:
                    xet = False
                    text.say(f"publish: {failure}; once more without Xet", sys.stderr)
                else:
                    PUBLISH.wait(max(failure.pause or 0, DELAYS[failures]), str(failure))
                failures += 1

    def merge(self, number: int, *, private: bool) -> RemoteCommit:
        """Merge the pull request, unless somebody has changed the same files meanwhile; returns the new `main`.

        Raises:
            PublishRefused: somebody has, or `main` does not have the payload's files afterwards.
        """
        now = self.repository.read()
        self.repository.refuse_public(now, private=private)
        self.repository.refuse_strangers(now, self.payload)
        self._refuse_overwriting(now)
        try:
            self.repository.merge(number)
        except PublishRefused:
            now = self.repository.read()
            if self.payload.differences(now.files):
                raise
            return now  # another run has published the same
        now = self.repository.read()
        self.repository.refuse_strangers(now, self.payload)
        if differing := self.payload.differences(now.files):
            name = min(differing)
            raise PublishRefused(
                f"{self.repository.repo_id}@{now.commit}: {name} {differing[name]} after pull request {number} was "
                "merged; publish again"
            )
        return now

    def _refuse_overwriting(self, now: RemoteCommit) -> None:
        touched = [name for name in sorted(self.payload.files) if now.files.get(name) != self.main.files.get(name)]
        if touched and self.payload.differences(now.files):
            raise PublishRefused(
                f"{self.repository.repo_id}: somebody changed {touched[0]} on main meanwhile (commit {now.commit}, was "
                f"{self.main.commit}); nothing was overwritten: look at it, then publish again"
            )

    def _find(self) -> int | None:
        """This user's open pull request of these bytes; one with other files, or behind `main`, is closed."""
        for pull in self.repository.pulls(self.key):
            if pull.status not in ("open", "draft"):
                continue
            remote = self.repository.read(f"refs/pr/{pull.num}")
            if self._others(remote) == self._others(self.main) and not pull.conflicting_files:
                return pull.num
            self.repository.close(pull.num, "Closed by lora-fuse: main has moved on since; a new one takes its place.")
        return None

    def _others(self, remote: RemoteCommit) -> dict[str, object]:
        """The files that are not the payload's, but for the one in which the Hub notes by itself what is large."""
        strangers = self.payload.strangers(remote.files)
        return {name: file for name, file in strangers.items() if name != ".gitattributes"}

    def _batch(self, names: list[str]) -> list[str]:
        """The first of these files that make up a commit."""
        size = 0
        for count, name in enumerate(names):
            size += self.payload.files[name].size
            if count and size > BATCH:
                return names[:count]
        return names

    def _send(self, names: list[str], number: int | None, remote: RemoteCommit, *, xet: bool) -> int | None:
        """Make a commit on a pull request, or on a new one from `remote`; returns the number of the new one.

        Raises:
            AttemptFailed: it did not work, or its answer was lost: read the repository.
        """
        repo_id = self.repository.repo_id
        size = progress.human_bytes(sum(self.payload.files[name].size for name in names))
        files = "file" if len(names) == 1 else "files"
        where = f"pull request {number}" if number else "a new pull request"
        progress.log(f"publish: {len(names)} {files}, {size} to {where} of {repo_id}")
        order = {
            "order": "commit",
            "bars": sys.stderr.isatty() and not progress.is_silent(),
            "repo_id": repo_id,
            "revision": f"refs/pr/{number}" if number else None,
            "parent": remote.commit,
            "title": f"{self.message}, manifest {self.key}",
            "description": "Merged by lora-fuse itself when every file is here as the manifest says.",
            "paths": {name: str(self.payload.paths[name]) for name in names},
        }
        what = f"publishing to {repo_id}"
        with closing(WorkerProcess(silence(), xet=xet, shows_stderr=True)) as worker:
            pace = Pace(worker.stall_seconds)
            try:
                worker.send(order)
                while pace.quiet <= pace.seconds:
                    message = worker.receive(min(pace.seconds / 8, 0.5))
                    if "ready" in message:
                        pace = Pace(silence())
                    if "result" in message:
                        return message["result"]  # type: ignore[no-any-return]
                    if failed := message.get("failed"):
                        raise AttemptFailed(failed["reason"], pause=failed["pause"], without_xet=failed["without_xet"])
                    pace.add(message.get("moved", 0))
            except EOFError as error:
                raise AttemptFailed(f"{what}: the process that sends was ended; publish again") from error
        reason = f"{what}: {TOO_SLOW} {silence():g} s; check the connection and publish again"
        raise AttemptFailed(reason, without_xet=True, stalled=True)
