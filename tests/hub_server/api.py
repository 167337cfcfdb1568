"""What the Hub's handlers share: accounts, storages, and the repository and revision that a path names."""

from dataclasses import dataclass, field
from urllib.parse import unquote

from starlette.requests import Request

from tests.hub_server.lfs import LfsStore
from tests.hub_server.model import PULL_REQUEST, Entry, HubError, Registry, Repo, User
from tests.hub_server.xet import XetStore

LFS_SUFFIXES = (".bin", ".ckpt", ".gz", ".jpg", ".model", ".png", ".pt", ".safetensors", ".zip")


@dataclass(slots=True)
class Api:
    """What all handlers have: the registry, the storages, and who asks for what.

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


def repo_id(request: Request) -> str:
    return f"{request.path_params['owner']}/{request.path_params['name']}"


def revision(request: Request) -> str:
    return unquote(request.path_params.get("revision", "main"))
