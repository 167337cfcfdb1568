"""A repository on the Hub as publishing needs it: read, created, its pull requests found, merged, closed, its tags."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_fuse.errors import PublishRefused
from lora_fuse.hub.client import client, endpoint
from lora_fuse.hub.payload import is_let_be
from lora_fuse.hub.repository import remote_files
from lora_fuse.hub.retry import PUBLISH

if TYPE_CHECKING:
    from collections.abc import Mapping

    from huggingface_hub import DiscussionWithDetails

    from lora_fuse.hub.payload import Payload
    from lora_fuse.hub.sources import ExpectedFile

LOOKED_AT = 20  # pull requests of the same bytes: a run that fails leaves one at most
SHOWN = 5  # strange files that a message names


@dataclass(frozen=True, slots=True)
class RemoteCommit:
    """A repository as the Hub reports it at a commit."""

    commit: str
    private: bool
    files: Mapping[str, ExpectedFile]


@dataclass(frozen=True, slots=True)
class RemoteRepository:
    """A model repository on the Hub.

    Every method raises `PublishRefused` when the Hub cannot be had or refuses.
    """

    repo_id: str

    def read(self, revision: str | None = None) -> RemoteCommit:
        """The files at a revision, `main` if None, with their hashes."""
        info = PUBLISH.ask(
            f"reading {self.repo_id} back",
            self.repo_id,
            lambda: client().model_info(self.repo_id, revision=revision, files_metadata=True),
        )
        return RemoteCommit(str(info.sha), bool(info.private), remote_files(info))

    def open(self, *, private: bool) -> RemoteCommit:
        """The repository's `main`; the repository is created if it is not there.

        Raises:
            PublishRefused: more people can see it than asked; nothing was sent.
        """
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            main = self.read()
        except PublishRefused as refusal:
            if not isinstance(refusal.__cause__, RepositoryNotFoundError):
                raise
            PUBLISH.ask(
                f"creating {self.repo_id}",
                self.repo_id,
                lambda: client().create_repo(self.repo_id, private=private, exist_ok=True),
            )
            main = self.read()
        self.refuse_public(main, private=private)
        return main

    def refuse_public(self, remote: RemoteCommit, *, private: bool) -> None:
        """Refuse a public repository where a private one is asked for; its visibility is not ours to change."""
        if private and not remote.private:
            raise PublishRefused(
                f"{self.repo_id} is public, and a private repository is asked for; make it private in its settings at "
                f"{endpoint()}/{self.repo_id}/settings, name another one, or set publish.private to false"
            )

    def refuse_strangers(self, remote: RemoteCommit, payload: Payload) -> None:
        """Refuse a repository with files that a download's check would not let pass: code, weights, settings."""
        strangers = sorted(name for name in payload.strangers(remote.files) if not is_let_be(name))
        if strangers:
            more = f" and {len(strangers) - SHOWN} more" if len(strangers) > SHOWN else ""
            raise PublishRefused(
                f"{self.repo_id} holds {', '.join(strangers[:SHOWN])}{more}, which is no part of this checkpoint: "
                "a library may load it, and a download's `verify` fails; delete it there, or name another repository"
            )

    # ------------------------------------------------------------ pull requests

    def pulls(self, key: str) -> list[DiscussionWithDetails]:
        """This user's pull requests whose title has `key` in it, oldest first; no more than the newest `LOOKED_AT`."""
        what = f"listing the pull requests of {self.repo_id}"
        pulls = PUBLISH.ask(
            what,
            self.repo_id,
            lambda: [
                pull
                for pull in client().get_repo_discussions(self.repo_id, discussion_type="pull_request")
                if pull.is_pull_request and key in pull.title
            ],
        )
        if not pulls:
            return []
        me = PUBLISH.ask(what, self.repo_id, lambda: str(client().whoami()["name"]))
        numbers = sorted(pull.num for pull in pulls if pull.author == me)
        return [self.pull(number) for number in numbers[-LOOKED_AT:]]

    def pull(self, number: int) -> DiscussionWithDetails:
        """A pull request's state."""
        what = f"reading pull request {number} of {self.repo_id}"
        return PUBLISH.ask(what, self.repo_id, lambda: client().get_discussion_details(self.repo_id, number))

    def close(self, number: int, comment: str) -> None:
        """Close a pull request and say why."""
        PUBLISH.ask(
            f"closing pull request {number} of {self.repo_id}",
            self.repo_id,
            lambda: client().change_discussion_status(self.repo_id, number, "closed", comment=comment),
        )

    def merge(self, number: int) -> None:
        """Merge a pull request."""
        try:
            PUBLISH.ask(
                f"merging {endpoint()}/{self.repo_id}/discussions/{number}",
                self.repo_id,
                lambda: client().merge_pull_request(self.repo_id, number),
                landed=lambda: self.pull(number).status == "merged",
            )
        except PublishRefused as refusal:
            raise PublishRefused(
                f"{refusal}; every file is in the pull request: merge it there, or publish again"
            ) from refusal.__cause__

    # ------------------------------------------------------------ tags

    def tagged(self, tag: str) -> str | None:
        """The commit that a tag is on."""
        what = f"listing the tags of {self.repo_id}"
        refs = PUBLISH.ask(what, self.repo_id, lambda: client().list_repo_refs(self.repo_id).tags)
        return next((ref.target_commit for ref in refs if ref.name == tag), None)

    def refuse_other_tag(self, tag: str, tagged: str | None, commit: str | None) -> None:
        """Refuse a tag that is on another commit: a tag that moves is no pin."""
        if tagged is not None and tagged != commit:
            wanted = f"commit {commit}" if commit else "these bytes, which are not there yet"
            raise PublishRefused(
                f"{self.repo_id} has the tag {tag} on commit {tagged}, and it is asked for on {wanted}; "
                "set publish.tag to a new name"
            )

    def tag(self, tag: str, commit: str) -> None:
        """Tag a commit; a tag that is there already counts if it is on this commit.

        Raises:
            PublishRefused: also if it is on another commit.
        """

        def is_tagged() -> bool:
            tagged = self.tagged(tag)
            self.refuse_other_tag(tag, tagged, commit)
            return tagged is not None

        if not is_tagged():
            PUBLISH.ask(
                f"tagging {self.repo_id}@{commit} as {tag}",
                self.repo_id,
                lambda: client().create_tag(self.repo_id, tag=tag, revision=commit),
                landed=is_tagged,
            )
