"""One commit sent by a process of its own, which is ended when no byte moves any more."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lora_fuse.errors import PublishRefused
from lora_fuse.hub.client import is_without_xet
from lora_fuse.hub.retry import silence
from lora_fuse.machine import progress

if TYPE_CHECKING:
    from collections.abc import Mapping

WITHOUT_XET, WITHOUT_BARS = "HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_PROGRESS_BARS"


class CommitFailed(PublishRefused):
    """A commit that did not work, or whose answer is lost.

    `pause` is after how many seconds the same may be tried again, None if that would not help; `over_xet` whether it
    may be tried without Xet.
    """

    def __init__(self, message: str, *, pause: float | None = None, over_xet: bool = False) -> None:
        super().__init__(message)
        self.pause, self.over_xet = pause, over_xet


@dataclass(frozen=True, slots=True)
class CommitJob:
    """A commit: files by their POSIX path, on a pull request's `revision`, or on a new one from `parent`."""

    repo_id: str
    revision: str | None
    parent: str
    title: str
    description: str
    paths: Mapping[str, str]


def send(shipment: CommitJob, *, xet: bool) -> int | None:
    """Make the commit; returns the number of the pull request that was opened for it, if one was.

    Raises:
        CommitFailed: it did not work, or nobody knows whether it did: read the repository.
    """
    xet = xet and not is_without_xet()
    changed = ({} if xet else {WITHOUT_XET: "1"}) | ({WITHOUT_BARS: "1"} if progress.is_silent() else {})
    outcome = _outcome(shipment, changed)
    if "error" in outcome:
        raise CommitFailed(outcome["error"], pause=outcome["pause"], over_xet=xet and outcome["over_xet"])
    return outcome["pull"]  # type: ignore[no-any-return]


def _outcome(shipment: CommitJob, changed: Mapping[str, str]) -> dict[str, Any]:
    """What the sender says at its end; a failure in the same form if it says nothing."""
    what, said = f"publishing to {shipment.repo_id}", b""
    try:
        said = _listen(json.dumps(asdict(shipment)).encode(), {**os.environ, **changed})
        return dict(json.loads(said.split(b"\n")[-2]))
    except TimeoutError:
        error = f"{what}: no byte moved for {silence():g} s; check the connection and publish again"
        return {"error": error, "pause": None, "over_xet": True}
    except (ValueError, IndexError):
        return {"error": f"{what}: the process that sends was ended; publish again", "pause": None, "over_xet": False}


def _listen(job: bytes, environment: Mapping[str, str]) -> bytes:
    """Everything that the sender says until it ends.

    Raises:
        TimeoutError: it said nothing for as long as silence is borne, and was ended.
    """
    command, said = [sys.executable, "-m", "lora_fuse.hub.sender"], b""
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as sender,
        selectors.DefaultSelector() as ready,
    ):
        try:
            stdin, stdout = sender.stdin, sender.stdout
            if stdin is None or stdout is None:
                raise TimeoutError
            ready.register(stdout, selectors.EVENT_READ)
            stdin.write(job)
            stdin.close()
            while ready.select(silence()):
                block = os.read(stdout.fileno(), 1 << 16)
                if not block:
                    return said
                said += block
        finally:
            sender.kill()
    raise TimeoutError
