"""The Hub's own API: its routes, accounts, and where to get a file."""

import re
from urllib.parse import unquote

import yaml
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.hub_server.api import revision
from tests.hub_server.changes import Changes, Pulls
from tests.hub_server.lfs import ranged
from tests.hub_server.listings import Listings
from tests.hub_server.model import HubError

MODEL = "/api/models/{owner}/{name}"


class HubApi(Listings, Changes, Pulls):
    """The handlers."""

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

    async def whoami(self, request: Request) -> Response:
        user = self._someone(request)
        token = {"displayName": "test", "role": user.role}
        auth = {"type": "access_token", "accessToken": token}
        return JSONResponse({"type": "user", "name": user.name, "orgs": [], "auth": auth})

    async def validate_yaml(self, request: Request) -> Response:
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
        repo, body = self._repo(request, write=True), await request.json()
        repo.gated = bool(body.get("gated", repo.gated))
        repo.private = body["visibility"] == "private" if "visibility" in body else repo.private
        return JSONResponse({})

    async def xet_token(self, request: Request) -> Response:
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
