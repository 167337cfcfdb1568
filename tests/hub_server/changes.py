"""The Hub's changes: commits on branches and on pull requests, uploads of large files, tags."""

import base64
import json
import re
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tests.hub_server.api import LFS_SUFFIXES, Api, revision
from tests.hub_server.model import PULL_REQUEST, Commit, Entry, HubError, PullRequest

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
