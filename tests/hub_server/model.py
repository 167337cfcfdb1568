"""What a Hub holds: repositories of commits of files, and who may see or change them."""

import hashlib
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Self

PULL_REQUEST = re.compile(r"refs/pr/(\d+)")


class HubError(Exception):
    """A refusal as the Hub words it: status, the code that clients tell cases apart by, and a sentence."""

    def __init__(
        self, status: int, code: str = "", message: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message or code)
        self.status, self.code, self.message, self.headers = status, code, message, dict(headers or {})


def git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    """What git stores in place of an LFS file (git-lfs, docs/spec.md)."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a commit: an LFS file has a `sha256` (and perhaps a Xet hash), others have `content` here."""

    size: int
    oid: str
    sha256: str | None = None
    xet: str | None = None
    content: bytes = b""

    @classmethod
    def regular(cls, content: bytes) -> Self:
        """A file that git holds itself."""
        return cls(len(content), git_blob(content), content=content)

    @classmethod
    def lfs(cls, sha256: str, size: int, xet: str | None) -> Self:
        """A file whose content lies in LFS or Xet storage."""
        return cls(size, git_blob(lfs_pointer(sha256, size)), sha256, xet)

    def lfs_json(self) -> dict[str, Any]:
        sha256 = self.sha256 or ""
        return {"oid": sha256, "sha256": sha256, "size": self.size, "pointerSize": len(lfs_pointer(sha256, self.size))}


@dataclass(frozen=True, slots=True)
class Commit:
    """A state of a repository."""

    oid: str
    tree: Mapping[str, Entry]
    title: str
    message: str = ""
    parent: str | None = None
    date: str = field(default_factory=now)


@dataclass(slots=True)
class PullRequest:
    """A pull request: its branch starts at `base` and has its own head until it is merged."""

    number: int
    title: str
    author: str
    base: str
    head: str
    status: str = "open"
    merge_commit: str | None = None
    events: list[dict[str, Any]] = field(default_factory=list)
    created: str = field(default_factory=now)

    @property
    def is_open(self) -> bool:
        return self.status in ("open", "draft")


def changed(before: Mapping[str, Entry], after: Mapping[str, Entry]) -> dict[str, Entry | None]:
    """What differs between two trees, by path; None where a file is gone."""
    paths = sorted(before.keys() | after.keys())
    return {path: after.get(path) for path in paths if before.get(path) != after.get(path)}


@dataclass(slots=True)
class Repo:
    """A model repository."""

    id: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[int, PullRequest] = field(default_factory=dict)

    @property
    def head(self) -> Commit:
        return self.at("main")

    def at(self, revision: str) -> Commit:
        """The commit that a branch, tag, pull request or (shortened) commit id stands for."""
        oid = self.branches.get(revision) or self.tags.get(revision)
        if match := PULL_REQUEST.fullmatch(revision):
            pull = self.pulls.get(int(match[1]))
            oid = pull.head if pull else None
        elif oid is None and re.fullmatch(r"[0-9a-f]{7,40}", revision):
            oid = next((known for known in self.commits if known.startswith(revision)), None)
        if oid is None:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[oid]

    def commit(
        self, changes: Mapping[str, Entry | None], *, revision: str = "main", title: str = "", message: str = ""
    ) -> Commit:
        """Add a commit to a branch or pull request: entries to set by path, None to delete one."""
        parent = self.at(revision) if self.commits else None
        tree = {**(parent.tree if parent else {}), **changes}
        kept = {path: entry for path, entry in sorted(tree.items()) if entry is not None}
        commit = Commit(secrets.token_hex(20), kept, title, message, parent.oid if parent else None)
        self.commits[commit.oid] = commit
        if match := PULL_REQUEST.fullmatch(revision):
            self.pulls[int(match[1])].head = commit.oid
        else:
            self.branches[revision] = commit.oid
        return commit

    def open_pull(self, title: str, author: str, start: str | None = None) -> PullRequest:
        """Open a pull request against `main`, from its head or from an older commit of it."""
        base = start or self.head.oid
        pull = PullRequest(len(self.pulls) + 1, title, author, base, base)
        self.pulls[pull.number] = pull
        return pull

    def changes(self, pull: PullRequest) -> dict[str, Entry | None]:
        return changed(self.commits[pull.base].tree, self.commits[pull.head].tree)

    def conflicts(self, pull: PullRequest) -> list[str]:
        """The paths that both a pull request and `main` have changed since its base, to different content."""
        ours, theirs = self.changes(pull), changed(self.commits[pull.base].tree, self.head.tree)
        return [path for path in ours if path in theirs and ours[path] != theirs[path]] if pull.is_open else []

    def merge(self, pull: PullRequest) -> Commit:
        """Squash a pull request onto `main`: one commit, titled `TITLE (#NUMBER)`."""
        if not pull.is_open:
            raise HubError(409, message=f"This pull request is {pull.status}")
        if conflicts := self.conflicts(pull):
            raise HubError(409, message=f"This pull request has conflicts: {', '.join(conflicts)}")
        made = self.commit(self.changes(pull), title=f"{pull.title} (#{pull.number})")
        pull.status, pull.merge_commit = "merged", made.oid
        return made


@dataclass(frozen=True, slots=True)
class User:
    """Whom a token belongs to, and what it may do: `read`, `write`, or nothing since it has `expired`."""

    name: str
    role: str


class Registry:
    """All repositories and tokens."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.tokens = {
            "hf_write": User("alice", "write"),
            "hf_read": User("bob", "read"),
            "hf_expired": User("alice", "expired"),
            "hf_other": User("carol", "write"),
        }

    def create(self, repo_id: str, *, private: bool = False, gated: bool = False) -> Repo:
        """A new repository with the first commit that the Hub makes itself."""
        repo = self.repos[repo_id] = Repo(repo_id, private, gated)
        attributes = Entry.regular(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
        repo.commit({".gitattributes": attributes}, title="initial commit")
        return repo

    def user(self, authorization: str) -> User | None:
        """Who sends a request, by its `Authorization` header."""
        token = authorization.removeprefix("Bearer ").strip()
        if not token:
            return None
        user = self.tokens.get(token)
        if user is None:
            raise HubError(401, message="Invalid credentials in Authorization header")
        if user.role == "expired":
            raise HubError(401, message=f'User Access Token "{user.name}-token" is expired')
        return user

    def open(
        self, repo_id: str, user: User | None, *, write: bool = False, propose: bool = False, content: bool = False
    ) -> Repo:
        """A repository, if the user may see it, change it (`write`) or read its files (`content`).

        To `propose` a change in a pull request takes a token that may write, to any repository that it can see.
        """
        repo = self.repos.get(repo_id)
        owner = user is not None and user.name == repo_id.split("/", maxsplit=1)[0]
        if repo is None or (repo.private and not owner):
            raise HubError(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and not (owner and user is not None and user.role == "write"):
            raise HubError(403 if user else 401, message="Forbidden: you must use a write token to upload.")
        if propose and (user is None or user.role != "write"):
            raise HubError(403 if user else 401, message="Forbidden: you must use a write token to upload.")
        if content and repo.gated and not owner:
            raise HubError(403 if user else 401, "GatedRepo", f"Access to model {repo_id} is restricted.")
        return repo
