"""The Hub's pull requests: opened, listed, commented, closed and merged."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tests.hub_server.api import Api
from tests.hub_server.model import HubError, PullRequest, Repo, now

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
