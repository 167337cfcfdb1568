"""The Hub's changes: commits, uploads of large files, tags, and pull requests from their opening to their merge."""

import base64
import json
import re
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tests.hub_server.api import LFS_SUFFIXES, Api, revision
from tests.hub_server.model import PULL_REQUEST, Commit, Entry, HubError, PullRequest, Repo, now

LFS_SIZE = 10 << 20  # bytes; a larger file of any kind goes to LFS


class Changes(Api):
    """Handlers that change a repository's files."""

    async def preupload(self, request: Request) -> Response:
        """Say of each file whether it goes to LFS, and what is there now."""
        repo = self._repo_to_change(request, revision(request))
        commit, body = repo.at(revision(request)), await request.json()
        files = []
        for file in body["files"]:
            is_text = b"\0" not in base64.b64decode(file["sample"])
            regular = is_text and file["size"] <= LFS_SIZE and not file["path"].endswith(LFS_SUFFIXES)
            held = commit.tree.get(file["path"])
            oid = {"oid": held.sha256 or held.oid} if held else {}
            mode = "regular" if regular else "lfs"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **oid})
        return JSONResponse({"files": files, "commitOid": commit.oid})

    async def lfs_batch(self, request: Request) -> Response:
        body = await request.json()
        self._repo_to_change(request, body["ref"]["name"]) if "ref" in body else self._repo(request, propose=True)
        answer = self.lfs.batch(body, self.base_url, self._holds)
        return JSONResponse(answer, media_type="application/vnd.git-lfs+json")

    def _holds(self, sha256: str) -> bool:
        return self.lfs.path(sha256).exists() or (self.xet is not None and self.xet.find(sha256) is not None)

    async def commit(self, request: Request) -> Response:
        """Make a commit on a branch, or on a new pull request (`create_pr`)."""
        as_pull = "create_pr" in request.query_params
        target = revision(request)
        repo = self._repo_to_change(request, target)
        head, *lines = [json.loads(line) for line in (await request.body()).splitlines() if line.strip()]
        title, parent = head["value"]["summary"], head["value"].get("parentCommit")
        base = repo.at(target)
        if match := PULL_REQUEST.fullmatch(target):
            _refuse_closed(repo.pulls[int(match[1])])
        if as_pull and target not in repo.branches:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {target}")
        if parent and not as_pull and not base.oid.startswith(parent):
            raise HubError(412, message="The branch was updated since you opened this page. Please refresh.")
        changes: dict[str, Entry | None] = {}
        for line in lines:
            changes |= self._change(line["key"], line["value"], base)
        changes |= {path: entry for path, entry in self.tampered.items() if path in changes}
        changes |= attributes(changes, base)
        answer: dict[str, Any] = {"success": True, "hookOutput": ""}
        if as_pull:
            pull = repo.open_pull(title, self._someone(request).name, repo.at(parent).oid if parent else None)
            target = f"refs/pr/{pull.number}"
            answer["pullRequestUrl"] = f"{self.base_url}/{repo.id}/discussions/{pull.number}"
        made = repo.commit(changes, revision=target, title=title, message=head["value"].get("description", ""))
        url = f"{self.base_url}/{repo.id}/commit/{made.oid}"
        return JSONResponse({**answer, "commitUrl": url, "commitOid": made.oid})

    def _change(self, kind: str, value: dict[str, Any], base: Commit) -> dict[str, Entry | None]:
        path = value["path"]
        if path.startswith("/") or ".." in path.split("/"):
            raise HubError(422, message=f"Invalid path in repo: {path}")
        if kind == "file":
            return {path: Entry.regular(base64.b64decode(value["content"]))}
        if kind == "lfsFile":
            return {path: self._large(path, value["oid"])}
        if kind == "deletedFile" and path in base.tree:
            return {path: None}
        if kind == "deletedFolder":
            return {held: None for held in base.tree if held.startswith(path.rstrip("/") + "/")}
        raise HubError(404, "EntryNotFound", f"nothing to do for {kind} {path}")

    def _large(self, path: str, sha256: str) -> Entry:
        name = self.xet.find(sha256) if self.xet else None
        if self.xet and name:
            if not self.xet.is_intact(name):
                raise HubError(400, message=f"sha256 mismatch for {path}")
            return Entry.lfs(sha256, self.xet.size(name), name)
        if not self.lfs.path(sha256).exists():
            raise HubError(400, message=f"LFS pointer pointed to a file that does not exist: {path}")
        return Entry.lfs(sha256, self.lfs.path(sha256).stat().st_size, None)

    async def tag(self, request: Request) -> Response:
        repo, body = self._repo(request, write=True), await request.json()
        if re.search(r"[\s~^:?*\[\\]", body["tag"]):
            raise HubError(400, message=f"Invalid tag name: {body['tag']}")
        if body["tag"] in repo.tags:
            raise HubError(409, message=f"Tag reference exists already: {body['tag']}")
        repo.tags[body["tag"]] = repo.at(revision(request)).oid
        return JSONResponse({})


def attributes(changes: dict[str, Entry | None], base: Commit) -> dict[str, Entry | None]:
    """Large files whose names do not say so are noted in `.gitattributes`, by the Hub itself."""
    held = base.tree.get(".gitattributes", Entry.regular(b"")).content
    large = [path for path, entry in changes.items() if entry and entry.sha256 and not path.endswith(".safetensors")]
    lines = [f"{path} filter=lfs diff=lfs merge=lfs -text\n".encode() for path in sorted(large)]
    new = b"".join(line for line in lines if line not in held)
    return {".gitattributes": Entry.regular(held + new)} if new else {}


def _refuse_closed(pull: PullRequest) -> None:
    if not pull.is_open:
        raise HubError(403, message=f"Forbidden: pull request {pull.number} is {pull.status}")


PAGE = 50  # pull requests that are listed at once


class Pulls(Api):
    """Handlers of pull requests."""

    async def open_discussion(self, request: Request) -> Response:
        repo, body = self._repo(request, propose=True), await request.json()
        pull = repo.open_pull(body["title"], self._someone(request).name)
        pull.status = "draft"
        url = f"{self.base_url}/{repo.id}/discussions/{pull.number}"
        return JSONResponse({"num": pull.number, "url": url, "pullRequest": True})

    async def discussions(self, request: Request) -> Response:
        """The pull requests, newest first, page by page; `closed` are merged ones too."""
        repo, query = self._repo(request), request.query_params
        states = {"open": ("open", "draft"), "closed": ("closed", "merged")}.get(query.get("status", "all"))
        found = [
            about_pull(repo, pull)
            for pull in reversed(repo.pulls.values())
            if (states is None or pull.status in states) and query.get("author", pull.author) == pull.author
        ]
        start = int(query.get("p", 0)) * PAGE
        return JSONResponse({"discussions": found[start : start + PAGE], "count": len(found), "start": start})

    async def discussion(self, request: Request) -> Response:
        """The state of a pull request, with what was said and which files `main` has changed too."""
        repo = self._repo(request)
        pull = self._pull(repo, request)
        changes = {"base": "refs/heads/main", **({"mergeCommitId": pull.merge_commit} if pull.merge_commit else {})}
        details = {"changes": changes, "events": pull.events, "diff": "", "filesWithConflicts": repo.conflicts(pull)}
        return JSONResponse({**about_pull(repo, pull), **details})

    async def comment(self, request: Request) -> Response:
        pull = self._pull(self._repo(request, propose=True), request)
        return JSONResponse(
            {"newMessage": self._event(request, pull, "comment", said((await request.json())["comment"]))}
        )

    async def set_status(self, request: Request) -> Response:
        """Close a pull request, or open it again, with a comment."""
        repo, body = self._repo(request, propose=True), await request.json()
        pull = self._pull(repo, request)
        if self._someone(request).name not in (pull.author, repo.id.split("/", maxsplit=1)[0]):
            raise HubError(403, message="Forbidden: you may not change this pull request")
        if pull.status == "merged":
            raise HubError(409, message="This pull request is merged")
        pull.status = body["status"]
        if body.get("comment"):
            self._event(request, pull, "comment", said(body["comment"]))
        return JSONResponse({"newStatus": self._event(request, pull, "status-change", {"status": pull.status})})

    def _event(self, request: Request, pull: PullRequest, kind: str, data: dict[str, Any]) -> dict[str, Any]:
        about = {"id": f"{pull.number}-{len(pull.events)}", "type": kind, "createdAt": now()}
        event = {**about, "author": {"name": self._someone(request).name}, "data": data}
        pull.events.append(event)
        return event

    async def merge(self, request: Request) -> Response:
        repo = self._repo(request, write=True)
        repo.merge(self._pull(repo, request))
        return JSONResponse({})

    @staticmethod
    def _pull(repo: Repo, request: Request) -> PullRequest:
        pull = repo.pulls.get(request.path_params["number"])
        if pull is None:
            raise HubError(404, message="no such discussion")
        return pull


def about_pull(repo: Repo, pull: PullRequest) -> dict[str, Any]:
    about = {"num": pull.number, "title": pull.title, "status": pull.status, "createdAt": pull.created}
    where = {"repo": {"name": repo.id, "type": "model"}, "isPullRequest": True}
    return {**about, **where, "author": {"name": pull.author}}


def said(text: str) -> dict[str, Any]:
    return {"edited": False, "hidden": False, "latest": {"raw": text, "html": text, "updatedAt": now()}}
