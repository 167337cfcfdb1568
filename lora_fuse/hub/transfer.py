"""Files of a commit brought into the cache by the Hub client in a process of its own, which is watched.

Bounds: a transfer that stops moving is ended and tried once more, over plain HTTP if it was free to use Xet; a Hub in
trouble is asked three times; whatever another process holds is waited for only while it moves, or for a while. Files
that are finished stay, whatever happens, and are not fetched again.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lora_fuse.errors import BadSource, NoSpace
from lora_fuse.hub.client import is_without_xet
from lora_fuse.hub.error_texts import full_disk
from lora_fuse.hub.leftovers import remove_leftovers
from lora_fuse.hub.worker_process import ClientProcess
from lora_fuse.machine import progress, space
from lora_fuse.recipe import hf_cache, sections

if TYPE_CHECKING:
    from collections.abc import Callable

PAUSES = (1.0, 2.0)  # seconds before the second and third try of a Hub in trouble
START = 60.0  # seconds that the child may take to begin, if `stall_seconds` is less
OTHERS = 10  # times `stall_seconds`: how long another process may hold a file without a visible byte


@dataclass(frozen=True, slots=True)
class Order:
    """What to transfer: `names` of a repository at a commit, even if they are in the cache (`again`)."""

    repo_id: str
    commit: str
    names: tuple[str, ...]
    again: bool

    @property
    def label(self) -> str:
        """What a person would call it."""
        whole = f"{self.repo_id}@{self.commit}"
        return whole if len(self.names) > 1 else f"{self.names[0]} of {whole}"


class _Failed(Exception):
    """One try failed; `again` if another may not, `plain` if that should do without Xet."""

    def __init__(self, reason: str, *, again: bool = False, plain: bool = False, stalled: bool = False) -> None:
        super().__init__(reason)
        self.again, self.plain, self.stalled = again, plain, stalled


class Transfers:
    """Transfers one after another by one child, as long as that does well."""

    def __init__(self, how: sections.DownloadParams) -> None:
        self._how = how
        self._child: ClientProcess | None = None
        self._plain = False  # do without Xet from now on

    def fetch(self, order: Order) -> None:
        """Have files in the cache. What they hold is not checked here.

        Raises:
            BadSource: they cannot be had, or stopped coming twice.
            NoSpace: the disk has less room than they need.
        """
        freed = remove_leftovers(order.repo_id, time.time())
        if freed:
            progress.log(f"download: {progress.human_bytes(freed)} of killed transfers of {order.repo_id} removed")
        tries: list[_Failed] = []
        with _Progress() as advance:
            while True:
                try:
                    return self._try(order, advance)
                except KeyboardInterrupt:
                    remove_leftovers(order.repo_id, time.time())
                    raise
                except _Failed as failed:
                    remove_leftovers(order.repo_id, time.time())
                    tries.append(failed)
                    if _is_last(tries):
                        raise BadSource(f"{order.label}: {_reasons(tries)}") from failed
                    self._plain = self._plain or failed.plain
                    without = " without Xet" if failed.plain else ""
                    _say(f"{order.label}: {failed}; trying again{without}")
                    time.sleep(0 if failed.stalled else PAUSES[len(tries) - 1])

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.end()
        self._child = None

    def _try(self, order: Order, progress: _Progress) -> None:
        if self._child is None:
            self._child = ClientProcess(plain=self._plain)
        try:
            _Watch(self._child, order, self._how, progress).until_done()
        except EOFError as error:
            raise _Failed(f"the Hub client's process {self._child.last_words()}; run again") from error
        except BaseException:
            self.close()
            raise


def _is_last(tries: list[_Failed]) -> bool:
    stalls = sum(failed.stalled for failed in tries)
    return not tries[-1].again or stalls > 1 or len(tries) > len(PAUSES)


def _reasons(tries: list[_Failed]) -> str:
    last = tries[-1]
    if not last.stalled:
        return str(last)
    before = " without Xet too" if any(failed.plain for failed in tries[:-1]) else " twice"
    return f"{last},{before}; check the connection and run again, or raise download.stall_seconds"


class _Progress(ExitStack):
    """Bytes done over all tries, shown if there are many."""

    def __init__(self) -> None:
        super().__init__()
        self._total: int | None = None
        self._done = self._shown = 0
        self._advance: Callable[[int], None] = lambda _: None

    def plan(self, plan: space.TransferPlan, *, silent: bool) -> None:
        """Begin, or begin again with what is left."""
        if self._total is None:
            self._total = plan.to_fetch
            if not silent:
                progress.log(f"download: {plan}{progress.estimate('download', plan.to_fetch)}")
            self._advance = self.enter_context(progress.byte_progress("download", plan.to_fetch, at_least=progress.FEW))
        self._done = self._total - plan.to_fetch

    def add(self, count: int) -> None:
        """Bytes written; what is written a second time does not count."""
        self._done += count
        if self._done > self._shown:
            self._advance(self._done - self._shown)
            self._shown = self._done


@dataclass(slots=True)
class _Watch:
    """Follows a child until it is done, fails, ends, or stops moving."""

    child: ClientProcess
    order: Order
    how: sections.DownloadParams
    progress: _Progress
    note: str = ""
    waiting: bool = False

    def until_done(self) -> None:
        """Follow it.

        Raises:
            _Failed: it failed, or stopped moving.
            NoSpace: there is no room for the files.
            EOFError: it ended without a word.
        """
        self.child.tell(json.dumps({**asdict(self.order), "workers": self.how.workers}))
        moved, traces = time.monotonic(), self._traces()
        while True:
            message = self.child.hear(timeout=min(self.how.stall_seconds / 8, 0.5))
            if "folder" in message:
                return
            if "plan" in message:
                self._plan(message["plan"])
                self.child.tell("go")
            if self._take(message) or self._traces() != traces:
                moved, traces, self.waiting = time.monotonic(), self._traces(), False
            self._be_patient(time.monotonic() - moved)

    def _plan(self, files: list[tuple[str, int, bool]]) -> None:
        plan = space.TransferPlan(self.order.label, tuple(files), hf_cache.cache_dir())
        self.progress.plan(plan, silent=self.order.again)
        plan.check()

    def _take(self, message: dict[str, Any]) -> bool:
        """Note what is said; whether it is that something moved."""
        self.note = message.get("note", self.note)
        self.waiting = self.waiting or "waiting" in message
        if failed := message.get("failed"):
            if failed["full"]:
                raise NoSpace(f"{self.order.label}: {full_disk()}")
            plain = failed["xet"] and not is_without_xet()
            raise _Failed(failed["reason"], again=failed["again"] or plain, plain=plain)
        self.progress.add(int(message.get("done", 0)))
        return not message.keys().isdisjoint({"ready", "plan", "done", "moved"})

    def _traces(self) -> list[tuple[str, int]]:
        """What can be seen on the disk, of this process or of one that is waited for."""
        traces = []
        for path in sorted((hf_cache.repository_folder(self.order.repo_id) / "blobs").glob("*")):
            try:
                traces.append((path.name, path.lstat().st_size))
            except FileNotFoundError:  # just finished
                continue
        return traces

    def _be_patient(self, quiet: float) -> None:
        """Refuse to wait any longer.

        Raises:
            _Failed: nothing moved for `quiet` seconds, and that is too long.
        """
        limit = self.how.stall_seconds if self.child.is_ready else max(START, self.how.stall_seconds)
        last = f" (last: {self.note.splitlines()[0]})" if self.note else ""
        if self.waiting and quiet > OTHERS * self.how.stall_seconds:
            raise _Failed(f"another process fetches it and has not moved for {quiet:.0f} s{last}; end that, run again")
        if not self.waiting and quiet > limit:
            said = f"no byte came for {quiet:.0f} s{last}"
            raise _Failed(said, again=True, plain=not is_without_xet(), stalled=True)


def _say(line: str) -> None:
    print(f"download: {line}", file=sys.stderr, flush=True)
