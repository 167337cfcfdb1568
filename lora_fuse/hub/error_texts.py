"""Texts for the errors of the Hub client: the fact, the reason and the way out, in one line."""

from __future__ import annotations

import errno

from lora_fuse.hub.client import cache_dir, endpoint, token
from lora_fuse.hub.wire.guard import NO_HUB, UnsafeExchange

# Scopes of fine-grained tokens, by the Hub's names.
READ = "repo.content.read"
WRITE = "repo.write"
LONGEST = 500  # characters of a Hub's words in a message
IN_TROUBLE = frozenset({408, 429, 500, 502, 503, 504})  # the same request may work in a moment


def full_disk() -> str:
    """The text for a disk that filled up on the way."""
    return f"the disk of {cache_dir()} is full; make room, or set HF_HUB_CACHE to a larger disk, and run again"


def is_full_disk(error: BaseException) -> bool:
    """True for a full disk, which Xet reports in words only."""
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error)


def is_passing(error: BaseException) -> bool:
    """True if the same request may work in a moment: the Hub is in trouble, or the connection broke."""
    from httpx2 import TransportError
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in IN_TROUBLE
    return isinstance(error, TransportError)


def cause(error: BaseException) -> BaseException:
    """The reason for an error, which the client hides behind "not in the cache either" and its like."""
    from huggingface_hub import errors

    hiding = (errors.LocalEntryNotFoundError, errors.DryRunError, ValueError)
    while isinstance(error, hiding) and error.__cause__ is not None:
        error = error.__cause__
    return error


def explain(error: BaseException, repo_id: str, scope: str = READ) -> str:
    """The reason for an error of the client about a repository, and the way out; a token needs `scope` for the call."""
    from httpx2 import HTTPError  # the client's HTTP library, whose errors it lets through
    from huggingface_hub import errors

    error = cause(error)
    if isinstance(error, UnsafeExchange):
        return str(error)
    page = f"{endpoint()}/{repo_id}"
    give = f"give HF_TOKEN the scope {scope} for it" if token() else "set HF_TOKEN"
    gated = (
        f"give HF_TOKEN the right to read gated repositories, at {endpoint()}/settings/tokens"
        if token()
        else "set HF_TOKEN"
    )
    reasons: tuple[tuple[type[Exception], str], ...] = (
        (errors.HFValidationError, f"{repo_id!r} is no repository id; write owner/name"),
        (errors.GatedRepoError, f"the repository is gated; ask for access at {page}, then {gated}"),
        (errors.DisabledRepoError, f"the repository is disabled; see {page}"),
        (errors.RepositoryNotFoundError, f"no such repository, or a private one; check the name, or {give}"),
        (errors.RevisionNotFoundError, f"no such revision; see {page}/tree/main for what there is"),
        (errors.EntryNotFoundError, f"no such file at this revision; see {page}/tree/main"),
        (errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE is set, and this is not on the machine; unset it once"),
    )
    for kind, reason in reasons:
        if isinstance(error, kind):
            return reason
    first = (str(error).strip() or type(error).__name__).splitlines()[0][:LONGEST]
    if isinstance(error, errors.HfHubHTTPError):
        return _status(error, first, scope)
    if isinstance(error, RecursionError) or not isinstance(error, (HTTPError, OSError, RuntimeError, ValueError)):
        return f"{endpoint()} gave an answer that the client cannot read ({type(error).__name__}: {first}); {NO_HUB}"
    without = ", if need be with HF_HUB_DISABLE_XET=1" if isinstance(error, RuntimeError) else ""  # Xet's own class
    return f"{type(error).__name__}: {first}; check the connection and run again{without}"


def _status(error: Exception, first: str, scope: str) -> str:
    status: int = error.response.status_code  # type: ignore[attr-defined]
    message = (getattr(error, "server_message", None) or first)[:LONGEST]
    ways_out = {
        401: "renew HF_TOKEN" if token() else "set HF_TOKEN",
        403: f"give HF_TOKEN the right to do this (scope {scope}), at {endpoint()}/settings/tokens",
        412: "somebody else was faster, run again",
    }
    return f"{endpoint()} answered {status} ({message}); {ways_out.get(status, 'try again later')}"
