"""The Hub's listings: repositories, trees, references and history."""

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote

import yaml
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tests.hub_server.api import Api, revision
from tests.hub_server.model import Commit, Entry, HubError


class Listings(Api):
    """Handlers that list."""

    async def info(self, request: Request) -> Response:
        """A repository at a revision, with sizes and hashes of its files if asked (`blobs`)."""
        repo = self._repo(request)
        commit, blobs = repo.at(revision(request)), "blobs" in request.query_params
        files = [{"rfilename": path, **(sibling(entry) if blobs else {})} for path, entry in commit.tree.items()]
        about = {"_id": "0", "id": repo.id, "modelId": repo.id, "author": repo.id.split("/")[0], "sha": commit.oid}
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
        commit, form = self._repo(request).at(revision(request)), parse_qs((await request.body()).decode())
        expand = form.get("expand", [""])[0].lower() == "true"
        found = [(path, commit.tree[path]) for path in form.get("paths", ()) if path in commit.tree]
        return JSONResponse([file_json(path, entry, commit, expand=expand) for path, entry in found])

    async def refs(self, request: Request) -> Response:
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
        repo = self._repo(request)
        commit: Commit | None = repo.at(revision(request))
        history = []
        while commit:
            author = {"user": repo.id.split("/")[0]}
            text = {"title": commit.title, "message": commit.message, "date": commit.date}
            history.append({"id": commit.oid, **text, "authors": [author]})
            commit = repo.commits[commit.parent] if commit.parent else None
        return JSONResponse(history)


def ref(name: str, full: str, oid: str) -> dict[str, str]:
    return {"name": name, "ref": full, "targetCommit": oid}


def sibling(entry: Entry) -> dict[str, Any]:
    """Size and hashes of a file, in a repository's own listing."""
    return {"size": entry.size, "blobId": entry.oid, **({"lfs": entry.lfs_json()} if entry.sha256 else {})}


def file_json(path: str, entry: Entry, commit: Commit, *, expand: bool) -> dict[str, Any]:
    item: dict[str, Any] = {"type": "file", "oid": entry.oid, "size": entry.size, "path": path}
    if entry.sha256:
        item["lfs"] = entry.lfs_json()
    if entry.xet:
        item["xetHash"] = entry.xet
    if expand:
        item["lastCommit"] = {"id": commit.oid, "title": commit.title, "date": commit.date}
    return item
