"""A repository on the Hub as publishing needs it: read, created, its pull requests found, merged, closed, its tags."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_fuse.checkpoint import repository_files
from lora_fuse.errors import PublishRefused
from lora_fuse.hub.client import client, endpoint
from lora_fuse.hub.repository import remote_files
from lora_fuse.hub.retry import ask, call, pause_after, wait

if TYPE_CHECKING:
    from collections.abc import Mapping

    from huggingface_hub import DiscussionWithDetails, ModelInfo

    from lora_fuse.hub.payload import Payload
    from lora_fuse.hub.sources import ExpectedFile


@dataclass(frozen=True, slots=True)
class Remote:
    """A repository as the Hub reports it at a commit."""

    commit: str
    private: bool
    files: Mapping[str, ExpectedFile]


@dataclass(frozen=True, slots=True)
class Repository:
    """A model repository by its id, and what is asked of it.

    Every method raises `PublishRefused` when the Hub cannot be had or does not want to.
    """

    repo_id: str

    def read(self, revision: str | None = None) -> Remote:
        """The files at a revision, `main` if None, with their hashes."""
        what = f"reading {self.repo_id} back"
        info = ask(what, self.repo_id, lambda: self._info(revision))
        return Remote(str(info.sha), bool(info.private), remote_files(info))

    def _info(self, revision: str | None) -> ModelInfo:
        return client().model_info(self.repo_id, revision=revision, files_metadata=True)

    def open(self, *, private: bool) -> Remote:
        """The repository's `main`; it is created if it is not there.

        Raises:
            PublishRefused: it is visible to more people than asked; nothing was sent.
        """
        if not self._exists():
            what = f"creating {self.repo_id}"
            ask(what, self.repo_id, lambda: client().create_repo(self.repo_id, private=private, exist_ok=True))
        remote = self.read()
        self.refuse_public(remote, private=private)
        return remote

    def _exists(self) -> bool:
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            self.read()
        except PublishRefused as refusal:
            if not isinstance(refusal.__cause__, RepositoryNotFoundError):
                raise
            return False
        return True

    def refuse_public(self, remote: Remote, *, private: bool) -> None:
        """Refuse a public repository where a private one is asked for; its visibility is not ours to change."""
        if private and not remote.private:
            raise PublishRefused(
                f"{self.repo_id} is public, and a private repository is asked for; make it private in its settings at "
                f"{endpoint()}/{self.repo_id}/settings, name another one, or set publish.private to false"
            )

    def refuse_foreign_weights(self, remote: Remote, open_payload: Payload) -> None:
        """Weights that are there and not ours would be loaded, or mistaken, for part of what is published."""
        for name in sorted(open_payload.strangers(remote.files)):
            if repository_files.is_pickle(name) or name.endswith(".safetensors"):
                raise PublishRefused(
                    f"{self.repo_id} holds {name}, which is no part of this checkpoint; "
                    "delete it there, or name another repository"
                )

    # ------------------------------------------------------------ pull requests

    def pulls(self, key: str) -> list[DiscussionWithDetails]:
        """This user's pull requests whose title has `key` in it, oldest first."""
        what = f"listing the pull requests of {self.repo_id}"
        found = ask(
            what,
            self.repo_id,
            lambda: [
                one
                for one in client().get_repo_discussions(self.repo_id, discussion_type="pull_request")
                if one.is_pull_request and key in one.title
            ],
        )
        if not found:
            return []
        me = str(ask(what, self.repo_id, lambda: client().whoami())["name"])
        return [self.pull(one.num) for one in sorted(found, key=lambda one: one.num) if one.author == me]

    def pull(self, number: int) -> DiscussionWithDetails:
        """A pull request's state."""
        what = f"reading pull request {number} of {self.repo_id}"
        return ask(what, self.repo_id, lambda: client().get_discussion_details(self.repo_id, number))

    def close(self, number: int, comment: str) -> None:
        """Close a pull request and say why."""
        what = f"closing pull request {number} of {self.repo_id}"
        ask(
            what,
            self.repo_id,
            lambda: client().change_discussion_status(self.repo_id, number, "closed", comment=comment),
        )

    def merge(self, number: int) -> None:
        """Merge a pull request; an answer that is lost counts if it is merged."""
        what = f"merging {endpoint()}/{self.repo_id}/discussions/{number}"
        for delay in (1.0, 2.0, None):
            try:
                call(what, self.repo_id, lambda: client().merge_pull_request(self.repo_id, number))
            except PublishRefused as refusal:
                if self.pull(number).status == "merged":
                    return
                pause = None if delay is None else pause_after(refusal.__cause__, delay)
                if pause is None:
                    raise PublishRefused(
                        f"{refusal}; every file is in the pull request: merge it there, or publish again"
                    ) from refusal.__cause__
                wait(pause, str(refusal))
            else:
                return

    # ------------------------------------------------------------ tags

    def tagged(self, tag: str) -> str | None:
        """The commit that a tag is on."""
        what = f"listing the tags of {self.repo_id}"
        refs = ask(what, self.repo_id, lambda: client().list_repo_refs(self.repo_id))
        return next((found.target_commit for found in refs.tags if found.name == tag), None)

    def refuse_other_tag(self, tag: str, held: str | None, commit: str | None) -> None:
        """Refuse a tag that is on another commit: a tag that moves is no pin."""
        if held is not None and held != commit:
            wanted = f"commit {commit}" if commit else "these bytes, which are not there yet"
            raise PublishRefused(
                f"{self.repo_id} has the tag {tag} on commit {held}, and it is asked for on {wanted}; "
                "set publish.tag to a new name"
            )

    def tag(self, tag: str, commit: str) -> None:
        """Tag a commit; a tag that is there already counts if it is on this commit.

        Raises:
            PublishRefused: also if it is on another commit.
        """
        what = f"tagging {self.repo_id}@{commit} as {tag}"
        for delay in (1.0, 2.0, None):
            held = self.tagged(tag)
            self.refuse_other_tag(tag, held, commit)
            if held == commit:
                return
            try:
                call(what, self.repo_id, lambda: client().create_tag(self.repo_id, tag=tag, revision=commit))
            except PublishRefused as refusal:
                if self.tagged(tag) == commit:
                    return
                pause = None if delay is None else pause_after(refusal.__cause__, delay)
                if pause is None:
                    raise
                wait(pause, str(refusal))
            else:
                return
