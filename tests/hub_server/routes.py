"""The Hub's own API: accounts, repositories, listings, commits, pull requests, and where to get a file."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote

import yaml
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.hub_server.lfs import LfsStore, ranged
from tests.hub_server.model import PULL_REQUEST, Commit, Entry, HubError, PullRequest, Registry, Repo, User, now

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.requests import Request

    from tests.hub_server.xet import XetStore

LFS_SUFFIXES = (".bin", ".ckpt", ".gz", ".jpg", ".model", ".png", ".pt", ".safetensors", ".zip")
LFS_SIZE = 10 << 20  # bytes; a larger file of any kind goes to LFS
PAGE = 50  # pull requests that are listed at once
MODEL = "/api/models/{owner}/{name}"


@dataclass(slots=True)
class HubApi:
    """The handlers.

    Args:
        registry: what there is.
        lfs: storage of large files.
        xet: the other storage of large files; None for a Hub without it.
        cdn_host: stands in place of the server's own name where files are redirected to.
        page_size: entries of a listing that are given at once.
        base_url: the server's own address.
        tampered: what a commit keeps under a path, whatever it was given.
    """

    registry: Registry
    lfs: LfsStore
    xet: XetStore | None
    cdn_host: str = "localhost"
    page_size: int = 1000
    base_url: str = ""
    tampered: dict[str, Entry] = field(default_factory=dict)

    def routes(self) -> list[Route]:
        """Every route; a revision is one segment, percent-encoded as the client sends it."""
        return [
            Route("/api/whoami-v2", self.whoami),
            Route("/api/validate-yaml", self.validate_yaml, methods=["POST"]),
            Route("/api/repos/create", self.create, methods=["POST"]),
            Route("/{owner}/{name}.git/info/lfs/objects/batch", self.lfs_batch, methods=["POST"]),
            Route("/{owner}/{name}/resolve/{revision}/{path:path}", self.resolve),
            Route(MODEL, self.info),
            Route(MODEL + "/revision/{revision}", self.info),
            Route(MODEL + "/tree/{revision}", self.tree),
            Route(MODEL + "/tree/{revision}/{path:path}", self.tree),
            Route(MODEL + "/paths-info/{revision}", self.paths_info, methods=["POST"]),
            Route(MODEL + "/refs", self.refs),
            Route(MODEL + "/commits/{revision}", self.commits),
            Route(MODEL + "/preupload/{revision}", self.preupload, methods=["POST"]),
            Route(MODEL + "/commit/{revision}", self.commit, methods=["POST"]),
            Route(MODEL + "/tag/{revision}", self.tag, methods=["POST"]),
            Route(MODEL + "/settings", self.settings, methods=["PUT"]),
            Route(MODEL + "/xet-{scope}-token/{revision}", self.xet_token),
            Route(MODEL + "/discussions", self.open_discussion, methods=["POST"]),
            Route(MODEL + "/discussions", self.discussions),
            Route(MODEL + "/discussions/{number:int}", self.discussion),
            Route(MODEL + "/discussions/{number:int}/comment", self.comment, methods=["POST"]),
            Route(MODEL + "/discussions/{number:int}/status", self.set_status, methods=["POST"]),
            Route(MODEL + "/discussions/{number:int}/merge", self.merge, methods=["POST"]),
        ]

    # ------------------------------------------------------------ who asks for what

    def _user(self, request: Request) -> User | None:
        return self.registry.user(request.headers.get("authorization", ""))

    def _someone(self, request: Request) -> User:
        user = self._user(request)
        if user is None:
            raise HubError(401, message="Invalid username or password.")
        return user

    def _repo(self, request: Request, *, write: bool = False, propose: bool = False, content: bool = False) -> Repo:
        user = self._user(request)
        return self.registry.open(repo_id(request), user, write=write, propose=propose, content=content)

    def _repo_to_change(self, request: Request, target: str) -> Repo:
        """A branch takes the right to write, a new pull request or one of one's own only that to propose."""
        repo, user = self._repo(request, propose=True), self._user(request)
        match = PULL_REQUEST.fullmatch(target)
        pull = repo.pulls.get(int(match[1])) if match else None
        if "create_pr" in request.query_params or (pull and user and pull.author == user.name):
            return repo
        return self._repo(request, write=True)

    # ------------------------------------------------------------ accounts and repositories

    async def whoami(self, request: Request) -> Response:
        """Who the token belongs to."""
        user = self._someone(request)
        token = {"displayName": "test", "role": user.role}
        auth = {"type": "access_token", "accessToken": token}
        return JSONResponse({"type": "user", "name": user.name, "orgs": [], "auth": auth})

    async def validate_yaml(self, request: Request) -> Response:
        """Check the front matter of a card."""
        match = re.match(r"\s*---\r?\n(.*?)\r?\n---", (await request.json())["content"], re.DOTALL)
        try:
            meta = yaml.safe_load(match[1]) if match else {}
        except yaml.YAMLError as error:
            return JSONResponse({"errors": [{"message": str(error)}], "warnings": []}, 400)
        texts = ("license", "pipeline_tag", "library_name")
        wrong = [key for key in texts if not isinstance(meta.get(key, ""), str)] if isinstance(meta, dict) else ["it"]
        errors = [{"message": f"{key} has the wrong type"} for key in wrong]
        return JSONResponse({"errors": errors, "warnings": []}, 400 if errors else 200)

    async def create(self, request: Request) -> Response:
        """Create a repository; 409 if it is there, which the client takes for success under `exist_ok`."""
        user, body = self._someone(request), await request.json()
        owner = body.get("organization") or user.name
        name = f"{owner}/{body['name']}"
        if user.role != "write" or owner != user.name:
            raise HubError(403, message=f'You don\'t have the rights to create a model under "{owner}"')
        answer = {"url": f"{self.base_url}/{name}", "name": name, "id": name}
        if name in self.registry.repos:
            return JSONResponse({"error": "You already created this model repo", **answer}, 409)
        self.registry.create(name, private=body.get("visibility") == "private")
        return JSONResponse(answer)

    async def settings(self, request: Request) -> Response:
        """Change who may see a repository."""
        repo, body = self._repo(request, write=True), await request.json()
        repo.gated = bool(body.get("gated", repo.gated))
        repo.private = body["visibility"] == "private" if "visibility" in body else repo.private
        return JSONResponse({})

    # ------------------------------------------------------------ listings

    async def info(self, request: Request) -> Response:
        """A repository at a revision, with sizes and hashes of its files if asked (`blobs`)."""
        repo = self._repo(request)
        commit, blobs = repo.at(revision(request)), "blobs" in request.query_params
        files = [{"rfilename": path, **(sibling(entry) if blobs else {})} for path, entry in commit.tree.items()]
        about = {
            "_id": "0",
            "id": repo.id,
            "modelId": repo.id,
            "author": repo.id.split("/")[0],
            "sha": commit.oid,
        }
        readme = commit.tree.get("README.md")
        match = re.match(r"\s*---\r?\n(.*?)\r?\n---", readme.content.decode(), re.DOTALL) if readme else None
        about |= {"cardData": yaml.safe_load(match[1])} if match else {}
        dates = {"lastModified": commit.date, "createdAt": commit.date}
        state = {"private": repo.private, "gated": repo.gated and "auto", "disabled": False}
        return JSONResponse({**about, **dates, **state, "tags": [], "downloads": 0, "likes": 0, "siblings": files})

    async def tree(self, request: Request) -> Response:
        """Files and folders at a revision, page by page."""
        query, folder = request.query_params, unquote(request.path_params.get("path", ""))
        commit = self._repo(request).at(revision(request))
        recursive, expand = (query.get(key, "").lower() == "true" for key in ("recursive", "expand"))
        items = list(self._items(commit, folder, recursive=recursive, expand=expand))
        if folder and not items:
            raise HubError(404, "EntryNotFound", f"{folder} does not exist on {revision(request)}")
        start = int(query.get("cursor", 0))
        stop = start + self.page_size
        headers = {}
        if stop < len(items):
            rest = "&".join(f"{key}={value}" for key, value in query.items() if key != "cursor")
            headers["Link"] = f'<{self.base_url}{request.url.path}?{rest}&cursor={stop}>; rel="next"'
        return JSONResponse(items[start:stop], headers=headers)

    def _items(self, commit: Commit, folder: str, *, recursive: bool, expand: bool) -> Iterator[dict[str, Any]]:
        seen: set[PurePosixPath] = set()
        top = PurePosixPath(folder)
        for path, entry in commit.tree.items():
            file = PurePosixPath(path)
            if top not in file.parents:
                continue
            between = [parent for parent in reversed(file.parents) if top in parent.parents]
            for parent in between if recursive else between[:1]:
                if parent not in seen:
                    seen.add(parent)
                    yield {"type": "directory", "oid": "0" * 40, "size": 0, "path": str(parent)}
            if recursive or not between:
                yield file_json(path, entry, commit, expand=expand)

    async def paths_info(self, request: Request) -> Response:
        """The named files, where they exist."""
        commit, form = self._repo(request).at(revision(request)), parse_qs((await request.body()).decode())
        expand = form.get("expand", [""])[0].lower() == "true"
        found = [(path, commit.tree[path]) for path in form.get("paths", ()) if path in commit.tree]
        return JSONResponse([file_json(path, entry, commit, expand=expand) for path, entry in found])

    async def refs(self, request: Request) -> Response:
        """Branches, tags and (if asked) pull requests."""
        repo = self._repo(request)
        answer = {
            "branches": [ref(name, f"refs/heads/{name}", oid) for name, oid in repo.branches.items()],
            "tags": [ref(name, f"refs/tags/{name}", oid) for name, oid in repo.tags.items()],
            "converts": [],
        }
        if "include_prs" in request.query_params:
            pulls = repo.pulls.values()
            answer["pullRequests"] = [ref(str(pull.number), f"refs/pr/{pull.number}", pull.head) for pull in pulls]
        return JSONResponse(answer)

    async def commits(self, request: Request) -> Response:
        """The history of a revision, newest first."""
        repo = self._repo(request)
        commit: Commit | None = repo.at(revision(request))
        history = []
        while commit:
            author = {"user": repo.id.split("/")[0]}
            text = {"title": commit.title, "message": commit.message, "date": commit.date}
            history.append({"id": commit.oid, **text, "authors": [author]})
            commit = repo.commits[commit.parent] if commit.parent else None
        return JSONResponse(history)

    # ------------------------------------------------------------ changes

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
        """Where to upload objects."""
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
        """Tag a revision."""
        repo, body = self._repo(request, write=True), await request.json()
        if re.search(r"[\s~^:?*\[\\]", body["tag"]):
            raise HubError(400, message=f"Invalid tag name: {body['tag']}")
        if body["tag"] in repo.tags:
            raise HubError(409, message=f"Tag reference exists already: {body['tag']}")
        repo.tags[body["tag"]] = repo.at(revision(request)).oid
        return JSONResponse({})

    # ------------------------------------------------------------ pull requests

    async def open_discussion(self, request: Request) -> Response:
        """Open an empty pull request."""
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
        """Say something about a pull request."""
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
        """Merge a pull request into `main`."""
        repo = self._repo(request, write=True)
        repo.merge(self._pull(repo, request))
        return JSONResponse({})

    @staticmethod
    def _pull(repo: Repo, request: Request) -> PullRequest:
        pull = repo.pulls.get(request.path_params["number"])
        if pull is None:
            raise HubError(404, message="no such discussion")
        return pull

    # ------------------------------------------------------------ contents

    async def xet_token(self, request: Request) -> Response:
        """A token for the Xet storage."""
        reading = request.path_params["scope"] == "read"
        if reading:
            self._repo(request, content=True)
        else:
            self._repo_to_change(request, revision(request))
        if self.xet is None:
            raise HubError(404, message="this Hub has no Xet storage")
        return self.xet.grant(request.path_params["scope"])

    async def resolve(self, request: Request) -> Response:
        """A file, or for a large one where to get it: Xet hash and the address of another host."""
        repo, path = self._repo(request, content=True), unquote(request.path_params["path"])
        commit = repo.at(revision(request))
        headers, entry = {"X-Repo-Commit": commit.oid}, commit.tree.get(path)
        if entry is None:
            raise HubError(404, "EntryNotFound", "Entry not found", headers)
        headers["ETag"] = f'"{entry.oid}"'
        if entry.sha256 is None:
            return ranged(request, entry.size, lambda start, stop: iter([entry.content[start:stop]]), headers)
        headers |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
        if self.xet and entry.xet:
            token = f"{self.base_url}/api/models/{repo.id}/xet-read-token/{commit.oid}"
            headers |= {"X-Xet-Hash": entry.xet, "Link": f'<{token}>; rel="xet-auth"'}
            if not self.lfs.path(entry.sha256).exists():  # asked for over plain HTTP
                self.lfs.write(entry.sha256, self.xet.read(entry.xet))
        location = f"{self.base_url.replace('127.0.0.1', self.cdn_host)}/_lfs/{entry.sha256}"
        return Response(status_code=302, headers=headers | {"Location": location})


def repo_id(request: Request) -> str:
    """The repository that a path names."""
    return f"{request.path_params['owner']}/{request.path_params['name']}"


def revision(request: Request) -> str:
    """The revision that a path names."""
    return unquote(request.path_params.get("revision", "main"))


def attributes(changes: dict[str, Entry | None], base: Commit) -> dict[str, Entry | None]:
    """Large files whose names do not say so are noted in `.gitattributes`, by the Hub itself."""
    held = base.tree.get(".gitattributes", Entry.regular(b"")).content
    large = [path for path, entry in changes.items() if entry and entry.sha256 and not path.endswith(".safetensors")]
    lines = [f"{path} filter=lfs diff=lfs merge=lfs -text\n".encode() for path in sorted(large)]
    new = b"".join(line for line in lines if line not in held)
    return {".gitattributes": Entry.regular(held + new)} if new else {}


def about_pull(repo: Repo, pull: PullRequest) -> dict[str, Any]:
    """A pull request in a listing."""
    about = {"num": pull.number, "title": pull.title, "status": pull.status, "createdAt": pull.created}
    where = {"repo": {"name": repo.id, "type": "model"}, "isPullRequest": True}
    return {**about, **where, "author": {"name": pull.author}}


def said(text: str) -> dict[str, Any]:
    """The data of a comment."""
    return {"edited": False, "hidden": False, "latest": {"raw": text, "html": text, "updatedAt": now()}}


def _refuse_closed(pull: PullRequest) -> None:
    if not pull.is_open:
        raise HubError(403, message=f"Forbidden: pull request {pull.number} is {pull.status}")


def ref(name: str, full: str, oid: str) -> dict[str, str]:
    """An entry of the list of references."""
    return {"name": name, "ref": full, "targetCommit": oid}


def sibling(entry: Entry) -> dict[str, Any]:
    """Size and hashes of a file, in a repository's own listing."""
    return {"size": entry.size, "blobId": entry.oid, **({"lfs": entry.lfs_json()} if entry.sha256 else {})}


def file_json(path: str, entry: Entry, commit: Commit, *, expand: bool) -> dict[str, Any]:
    """A file in a tree listing."""
    item: dict[str, Any] = {"type": "file", "oid": entry.oid, "size": entry.size, "path": path}
    if entry.sha256:
        item["lfs"] = entry.lfs_json()
    if entry.xet:
        item["xetHash"] = entry.xet
    if expand:
        item["lastCommit"] = {"id": commit.oid, "title": commit.title, "date": commit.date}
    return item
