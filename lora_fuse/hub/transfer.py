"""Files of a commit brought into the cache by the Hub client in a process of its own, which is watched.

Bounds: a transfer that stops moving, or nearly (`lora_fuse.hub.wire.pace`), is ended and tried once more, over plain
HTTP if it was free to use Xet; one that brings more bytes than the Hub's list says is ended; a Hub in trouble is asked
again as often as `lora_fuse.hub.retry` says; a file that another process holds is waited for only while it moves, or
for a while. Files that are finished stay, whatever happens, and are not fetched again.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lora_fuse.errors import BadSource, NoSpace
from lora_fuse.hub.client import cache_dir, is_without_xet
from lora_fuse.hub.error_texts import LONGEST, full_disk
from lora_fuse.hub.leftovers import remove_leftovers
from lora_fuse.hub.retry import DELAYS
from lora_fuse.hub.wire.guard import NO_HUB
from lora_fuse.hub.wire.pace import TOO_SLOW, Pace
from lora_fuse.hub.worker_process import AttemptFailed, WorkerProcess
from lora_fuse.machine import files, progress, space, text
from lora_fuse.recipe import hf_cache, sections

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

OTHERS = 10  # times `stall_seconds`: how long another process may hold a file without a visible byte
LOOK = 0.1  # seconds between two looks at the cache; there is a message for every MB


@dataclass(frozen=True, slots=True)
class FetchOrder:
    """Files to fetch of a repository at a commit, even if they are in the cache (`again`)."""

    repo_id: str
    commit: str
    sizes: Mapping[str, int | None]  # bytes by the files' names, as the Hub lists them
    again: bool

    @property
    def label(self) -> str:
        """The repository and its commit, and the file if it is the only one."""
        whole = f"{self.repo_id}@{self.commit}"
        return whole if len(self.sizes) > 1 else f"{next(iter(self.sizes))} of {whole}"

    def promised(self, plan: Sequence[tuple[str, int, bool]]) -> int:
        """Bytes of all its files, by the Hub's list and what it says of each; of one without a size, `files.MOST`.

        Raises:
            AttemptFailed: the two differ, so one of them is wrong.
        """
        total = 0
        for name, size, _ in plan:
            listed = self.sizes.get(name)
            if listed is not None and size not in (0, listed):
                raise AttemptFailed(
                    f"{name} has {size} bytes where it is fetched from, and {listed} in the Hub's list; {NO_HUB}"
                )
            total += listed or size or files.MOST
        return total


class Transfers:
    """Transfers one after another by one worker, as long as that does well."""

    def __init__(self, how: sections.DownloadParams) -> None:
        self._how = how
        self._worker: WorkerProcess | None = None
        self._xet = not is_without_xet()

    def fetch(self, order: FetchOrder, arrived: Callable[[str], None]) -> None:
        """Have files in the cache; their content is not checked here.

        `arrived` is told of files that are whole while others are on their way, each once; not of those to fetch again.

        Raises:
            BadSource: they cannot be had, or stopped coming twice.
            NoSpace: the disk has less room than they need.
        """
        freed = remove_leftovers(order.repo_id, time.time())
        if freed:
            progress.log(f"download: {progress.human_bytes(freed)} of killed transfers of {order.repo_id} removed")
        failures: list[AttemptFailed] = []
        cached = _CachedFiles(order, arrived)
        with _FetchProgress() as shown:
            while True:
                try:
                    return self._attempt(order, cached, shown)
                except KeyboardInterrupt:
                    remove_leftovers(order.repo_id, time.time())
                    raise
                except AttemptFailed as failure:
                    remove_leftovers(order.repo_id, time.time())
                    failures.append(failure)
                    if _is_last(failures):
                        raise BadSource(f"{order.label}: {_reasons(failures)}") from failure
                    without = " without Xet" if failure.without_xet else ""
                    self._xet = self._xet and not failure.without_xet
                    text.say(f"download: {order.label}: {failure}; trying again{without}", sys.stderr)
                    time.sleep(0 if failure.stalled else max(failure.pause or 0, DELAYS[len(failures) - 1]))

    def start(self) -> WorkerProcess:
        """Start the worker, if none is at work: it takes a moment to import the Hub client."""
        if self._worker is None:
            self._worker = WorkerProcess(self._how.stall_seconds, xet=self._xet)
        return self._worker

    def close(self) -> None:
        """End the worker."""
        if self._worker is not None:
            self._worker.close()
        self._worker = None

    def _attempt(self, order: FetchOrder, cached: _CachedFiles, shown: _FetchProgress) -> None:
        worker = self.start()
        try:
            _FetchWatch(worker, order, self._how, cached, shown, self._xet).until_done()
        except EOFError as error:
            raise AttemptFailed(f"the Hub client's process {worker.ending()}; run again") from error
        except BaseException:
            self.close()
            raise


def _is_last(failures: list[AttemptFailed]) -> bool:
    stalls = sum(failure.stalled for failure in failures)
    return failures[-1].pause is None or stalls > 1 or len(failures) > len(DELAYS)


def _reasons(failures: list[AttemptFailed]) -> str:
    last = failures[-1]
    if not last.stalled:
        return str(last)
    before = " without Xet too" if any(failure.without_xet for failure in failures[:-1]) else " twice"
    return f"{last},{before}; check the connection and run again, or raise download.stall_seconds"


class _FetchProgress(ExitStack):
    """Bytes done over all attempts, shown if there are many."""

    def __init__(self) -> None:
        super().__init__()
        self._total: int | None = None
        self._done = 0
        self._shown = 0
        self._advance: Callable[[int], None] = lambda _: None

    def plan(self, label: str, files: Sequence[tuple[str, int, bool]], *, silent: bool) -> int:
        """Begin, or begin again with what is left, of files by name, bytes, and whether each has to be fetched.

        Returns the bytes to fetch.
        """
        to_fetch = sum(size for _, size, fetch in files if fetch)
        if self._total is None:
            self._total = to_fetch
            if not silent:
                progress.log(
                    f"download: {_plan_words(label, files, to_fetch)}{progress.estimate('download', to_fetch)}"
                )
            self._advance = self.enter_context(progress.byte_progress("download", to_fetch, at_least=progress.FEW))
        self._done = self._total - to_fetch
        return to_fetch

    def add(self, count: int) -> None:
        """Count bytes written; those written a second time do not count."""
        self._done += count
        if self._done > self._shown:
            self._advance(self._done - self._shown)
            self._shown = self._done


def _plan_words(label: str, files: Sequence[tuple[str, int, bool]], to_fetch: int) -> str:
    total = progress.human_bytes(sum(size for _, size, _ in files))
    cached = sum(not fetch for _, _, fetch in files)
    here = f"{cached} here already, " if cached else ""
    free = progress.human_bytes(space.free_bytes(cache_dir()))
    return f"{len(files)} files, {total} from {label}: {here}{progress.human_bytes(to_fetch)} to fetch, {free} free"


class _CachedFiles:
    """The files of an order as they lie in the Hub client's cache; `arrived` is told of each that is whole, once."""

    def __init__(self, order: FetchOrder, arrived: Callable[[str], None]) -> None:
        self._snapshot = hf_cache.snapshot_folder(order.repo_id, order.commit)
        self._blobs = hf_cache.repository_folder(order.repo_id) / "blobs"
        self._missing = set() if order.again else set(order.sizes)
        self._arrived = arrived

    def look(self) -> None:
        """Tell of those that arrived; the client puts a file into its place when it is whole."""
        here = [name for name in sorted(self._missing) if (self._snapshot / name).is_file()]
        self._missing -= set(here)
        for name in here:
            self._arrived(name)

    def sizes(self) -> dict[str, int]:
        """Sizes by name of what lies on the disk, of this process or of one that is waited for."""
        sizes = {}
        for path in sorted(self._blobs.glob("*")):
            try:
                sizes[path.name] = path.lstat().st_size
            except FileNotFoundError:  # just finished
                continue
        return sizes


@dataclass(slots=True)
class _FetchWatch:
    """A watch on a worker that fetches, until it is done, fails, ends, or stops moving."""

    worker: WorkerProcess
    order: FetchOrder
    how: sections.DownloadParams
    cached: _CachedFiles
    progress: _FetchProgress
    xet: bool
    note: str = ""
    waiting: bool = False
    written: int = 0  # bytes
    most: int = files.MOST  # bytes that may be written

    def until_done(self) -> None:
        """Give the order and watch until it is carried out.

        Raises:
            AttemptFailed: it failed, or nothing moved any more.
            NoSpace: there is no room for the files.
            EOFError: the worker ended without a word.
        """
        self.worker.send({"order": "fetch", **asdict(self.order), "workers": self.how.workers})
        pace = Pace(self.worker.stall_seconds)
        blobs = self.cached.sizes()
        looked = time.monotonic()
        while True:
            message = self.worker.receive(timeout=min(self.how.stall_seconds / 8, 0.5))
            if "result" in message:
                return
            if "plan" in message:
                self.most = self.order.promised(message["plan"])
                to_fetch = self.progress.plan(self.order.label, message["plan"], silent=self.order.again)
                way_out = "make room, or set HF_HUB_CACHE to a larger disk"
                space.require(cache_dir(), to_fetch, self.order.label, way_out)
                self.worker.send("go")
            if "ready" in message:
                pace = Pace(self.how.stall_seconds)
            moved = self._moved(message)
            pace.add(moved)
            now = blobs
            if not message or time.monotonic() - looked > LOOK:
                now = self.cached.sizes()
                self.cached.look()
                looked = time.monotonic()
            is_done = "plan" in message or "finished" in message or now.keys() != blobs.keys()
            if is_done or (self.waiting and (moved or now != blobs)):  # of another process no bytes are counted
                pace.restart()
                self.waiting = False
            blobs = now
            self._refuse_silence(pace)

    def _moved(self, message: dict[str, Any]) -> float:
        """Note a message; returns the bytes that it says have moved.

        Raises:
            AttemptFailed: it says that the worker failed, or that more came than was promised.
            NoSpace: it says that the disk is full.
        """
        self.note = message.get("note", self.note)[:LONGEST]
        self.waiting = self.waiting or "waiting" in message
        if failed := message.get("failed"):
            if failed["full"]:
                raise NoSpace(f"{self.order.label}: {full_disk()}")
            without_xet = self.xet and failed["without_xet"]
            raise AttemptFailed(failed["reason"], pause=failed["pause"], without_xet=without_xet)
        done = int(message.get("done", 0))
        self.written += done
        if self.written > self.most:
            raise AttemptFailed(f"more than the {self.most} bytes that the Hub promises came; {NO_HUB}")
        self.progress.add(done)
        return done + float(message.get("moved", 0))

    def _refuse_silence(self, pace: Pace) -> None:
        """Raise `AttemptFailed` if too little moved for too long."""
        last = f" (last: {self.note.splitlines()[0]})" if self.note else ""
        if self.waiting and pace.quiet > OTHERS * self.how.stall_seconds:
            raise AttemptFailed(
                f"another process fetches it and has not moved for {pace.quiet:.0f} s{last}; end that, run again"
            )
        if not self.waiting and pace.quiet > pace.seconds:
            reason = f"{TOO_SLOW} {pace.quiet:.0f} s{last}"
            raise AttemptFailed(reason, pause=0.0, without_xet=self.xet, stalled=True)
