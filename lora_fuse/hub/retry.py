"""Questions to a Hub: bounded in time, asked again where that may help, and refused in one line.

The Hub client has no timeout of its own, and does not repeat the calls that change something; a time limit of its HTTP
library begins anew with every byte. Here every call is bounded as a whole, with all its pages and pauses, and those
that may be repeated are, as often as `DELAYS` has entries.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from lora_fuse.errors import BadConfig, BadSource, NoSpace, PublishRefused, Refused
from lora_fuse.hub.client import client, endpoint
from lora_fuse.hub.error_texts import READ, WRITE, explain, full_disk, is_full_disk, is_passing
from lora_fuse.machine import text

if TYPE_CHECKING:
    from collections.abc import Callable

DELAYS = (1.0, 2.0, 4.0)  # seconds before the second, third and fourth attempt of anything
# Seconds that a Hub may make us wait: the window of its rate limits (huggingface.co/docs/hub/rate-limits).
LONGEST = 300.0
SILENCE = LONGEST + 60.0  # seconds
ANSWER = 120.0  # seconds that a Hub may take for one answer, where no setting says less
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Caller:
    """Calls of the Hub client on behalf of one stage, whose name is in the messages."""

    stage: str
    refusal: type[Refused]  # the error that a failed call becomes
    repeats_timeouts: bool  # a timeout is tried again like other trouble

    def call(
        self,
        what: str,
        repo_id: str,
        work: Callable[[], Answer],
        *,
        within: float | None = None,
        landed: Callable[[], Answer] | None = None,
    ) -> Answer:
        """Make a call once.

        Args:
            what: the call, as the message of a failure names it.
            repo_id: the repository that it is about.
            work: calls the client, and looks at its answer.
            within: seconds that it may take as a whole; `ANSWER`, or `silence` if that is less, where it is None.
            landed: after a failure, true if what was asked for is there, as an answer may be lost; it is the result.

        Raises:
            NoSpace: the disk of the cache is full.
            Refused: as the class `refusal`, if it failed; the message has no token and no signed address in it.
        """
        seconds = min(silence(), ANSWER) if within is None else within
        client()  # its import is not in the time that the Hub has
        try:
            return in_time(seconds, work)
        except Refused:
            raise
        except Exception as error:  # the client raises anything where an answer is none
            if landed is not None and (answer := landed()):
                return answer
            if is_full_disk(error):
                raise NoSpace(f"{what}: {full_disk()}") from error
            scope = READ if self.refusal is BadSource else WRITE
            raise self.refusal(f"{what}: {explain(error, repo_id, scope)}") from error

    def ask(
        self,
        what: str,
        repo_id: str,
        work: Callable[[], Answer],
        *,
        within: float | None = None,
        landed: Callable[[], Answer] | None = None,
    ) -> Answer:
        """Make a call that does no harm twice, and repeat it where that may help; see `call`.

        Raises:
            Refused: see `call`.
        """
        for delay in DELAYS:
            try:
                return self.call(what, repo_id, work, within=within, landed=landed)
            except self.refusal as error:
                pause = self.pause_after(error.__cause__, delay)
                if pause is None:
                    raise
                self.wait(pause, str(error))
        return self.call(what, repo_id, work, within=within, landed=landed)

    def pause_after(self, error: BaseException | None, delay: float) -> float | None:
        """Seconds after which the same call may be made again: `delay`, or what the Hub asks for; None if never.

        Storage is asked five times by the client itself, for half a minute; only calls of the API are repeated here.
        """
        from httpx2 import TimeoutException

        if error is None or not is_passing(error) or not is_from_api(error):
            return None
        if isinstance(error, TimeoutException) and not self.repeats_timeouts:
            return None
        return requested_pause(error, delay)

    def wait(self, seconds: float, reason: str) -> None:
        """Say why, and wait."""
        text.say(f"{self.stage}: {reason}; once more in {seconds:g} s", sys.stderr)
        time.sleep(seconds)


DOWNLOAD = Caller("download", BadSource, repeats_timeouts=True)
PUBLISH = Caller("publish", PublishRefused, repeats_timeouts=False)


def is_from_api(error: BaseException) -> bool:
    """True for an error of the Hub's API, false for one of its storage."""
    response = getattr(error, "response", None)
    request = response.request if response is not None else getattr(error, "request", None)
    return request is not None and str(request.url).startswith(f"{endpoint()}/api/")


def requested_pause(error: BaseException, delay: float) -> float | None:
    """Seconds that the header ``Retry-After`` of an answer asks to wait; `delay` if there is none, None if too many."""
    response = getattr(error, "response", None)
    seconds = response.headers.get("retry-after", "") if response is not None else ""
    pause = float(seconds) if re.fullmatch("[0-9]{1,9}", seconds) else delay
    return pause if pause <= LONGEST else None


def silence() -> float:
    """Seconds without a byte, after which an upload is given up: `LORA_FUSE_STALL_S`, or `SILENCE`.

    Raises:
        BadConfig: the variable holds no positive number.
    """
    seconds = os.environ.get("LORA_FUSE_STALL_S") or str(SILENCE)
    if not re.fullmatch(r"\d+(\.\d+)?", seconds) or float(seconds) <= 0:
        raise BadConfig(f"LORA_FUSE_STALL_S is {seconds!r}; give a number of seconds, or unset it for {SILENCE:g}")
    return float(seconds)


def in_time(seconds: float, work: Callable[[], Answer]) -> Answer:
    """Do work that may hang in a thread of its own, which is left behind when the time is up.

    Raises:
        httpx2.ReadTimeout: the time is up.
    """
    from httpx2 import ReadTimeout, Request

    future: Future[Answer] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # it is raised where the result is taken  # noqa: BLE001
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    if not wait([future], min(seconds, threading.TIMEOUT_MAX)).done:
        raise ReadTimeout(f"no whole answer in {seconds:g} s", request=Request("GET", f"{endpoint()}/api/"))
    return future.result()
