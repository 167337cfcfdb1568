"""How long to wait for a Hub: what is asked again and when, and how long silence is borne.

The Hub client has no timeout of its own, and does not repeat the calls that change something. Here every call is
bounded, and those that may be repeated are, as often as `DELAYS` has entries.
"""

from __future__ import annotations

import os
import re
import sys
import time
from typing import TYPE_CHECKING, TypeVar

from lora_fuse.errors import BadConfig, PublishRefused
from lora_fuse.hub.client import endpoint, token
from lora_fuse.hub.error_texts import IN_TROUBLE, client_errors

if TYPE_CHECKING:
    from collections.abc import Callable

DELAYS = (1.0, 2.0, 4.0)  # seconds
LONGEST = (
    300.0  # seconds that a Hub may make us wait: the window of its rate limits (huggingface.co/docs/hub/rate-limits)
)
SILENCE = LONGEST + 60.0  # seconds without a byte, after which a transfer is given up
Answer = TypeVar("Answer")


def silence() -> float:
    """Seconds without a byte, after which a transfer is given up: `LORA_FUSE_STALL_S`, or `SILENCE`.

    Raises:
        BadConfig: it is no positive number.
    """
    given = os.environ.get("LORA_FUSE_STALL_S") or str(SILENCE)
    if not re.fullmatch(r"\d+(\.\d+)?", given) or float(given) <= 0:
        raise BadConfig(f"LORA_FUSE_STALL_S is {given!r}; give a number of seconds, or unset it for {SILENCE:g}")
    return float(given)


def bound_requests(longest: float = 120.0) -> None:
    """From now on every request of this process's Hub client ends: after `longest` seconds, or `silence`."""
    from httpx2 import Client, Timeout
    from huggingface_hub import get_session, set_client_factory

    hooks, timeout = get_session().event_hooks, Timeout(min(silence(), longest))
    set_client_factory(lambda: Client(event_hooks=hooks, follow_redirects=True, timeout=timeout))


def call(what: str, repo_id: str, work: Callable[[], Answer]) -> Answer:
    """Ask the Hub, once.

    Raises:
        PublishRefused: it did not work; the message has no token and no signed address in it.
    """
    try:
        with client_errors(what, repo_id, PublishRefused):
            return work()
    except PublishRefused as error:
        raise PublishRefused(redacted(str(error))) from error.__cause__


def ask(what: str, repo_id: str, work: Callable[[], Answer]) -> Answer:
    """Ask the Hub something that does no harm twice; asked again when that may help.

    Raises:
        PublishRefused: see `call`.
    """
    for delay in DELAYS:
        try:
            return call(what, repo_id, work)
        except PublishRefused as error:
            pause = pause_after(error.__cause__, delay)
            if pause is None:
                raise
            wait(pause, str(error))
    return call(what, repo_id, work)


def wait(seconds: float, reason: str) -> None:
    """Say why, and wait."""
    print(f"publish: {reason}; once more in {seconds:g} s", file=sys.stderr, flush=True)
    time.sleep(seconds)


def pause_after(error: BaseException | None, delay: float) -> float | None:
    """Seconds after which the same may be asked again: `delay`, or what the Hub says; None if it would not help.

    Storage is asked five times by the client itself, for half a minute; only the API's own calls are repeated here.
    """
    from httpx2 import TimeoutException, TransportError
    from huggingface_hub.errors import HfHubHTTPError

    api = f"{endpoint()}/api/"
    if isinstance(error, HfHubHTTPError):
        if not str(error.response.request.url).startswith(api) or error.response.status_code not in IN_TROUBLE:
            return None
        asked = error.response.headers.get("retry-after", "")
        pause = float(asked) if asked.isdigit() else delay
        return pause if pause <= LONGEST else None
    if isinstance(error, TransportError) and not isinstance(error, TimeoutException):
        return delay if str(error.request.url).startswith(api) else None
    return None


def redacted(text: str) -> str:
    """Without the token, and without the query of any address: that is where signatures are."""
    secret = token()
    text = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]+", r"\1?…", text)
    return text.replace(secret, "(token)") if secret else text
