"""``python -m lora_fuse.hub.worker``: the Hub client's transfers as a process of its own, which can be killed.

Orders come in on stdin, messages go out on stdout, one JSON object a line. The order ``fetch`` brings files of a commit
into the cache, ``commit`` sends files. Messages: ``ready`` at the start; ``plan`` of a fetch (then a line on stdin says
to go on); ``moved`` and ``done`` bytes; ``note``, ``waiting``; and for each order in the end ``result`` or ``failed``.
When stdin ends, the parent is gone, and so is this process.
"""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from glob import escape
from pathlib import Path
from typing import Any

from lora_fuse.errors import Refused
from lora_fuse.hub.client import cache_dir, client, endpoint, is_without_xet, token
from lora_fuse.hub.error_texts import cause, explain, is_full_disk, is_passing
from lora_fuse.hub.retry import PUBLISH, is_from_api, requested_pause
from lora_fuse.machine import file_state, interrupts
from lora_fuse.recipe import hf_cache

CHUNK = 1 << 20  # bytes after which the client writes and reports; its own 10 MB hide a slow connection's progress
# The client's names for its bars of bytes, written to disk and received; the one without a name counts files.
KINDS = {"huggingface_hub.snapshot_download": "done", "huggingface_hub.snapshot_download.transfer": "moved"}
SHORT = "Consistency check failed"  # the client's words for a body that ends early
BEAT = 0.5  # seconds between two looks at what a commit moves
READ = 1 << 16  # bytes; the look itself reads far fewer
BYTES_ACKED = 120  # offset in struct tcp_info (linux/tcp.h): bytes that the other side has, and bytes received

Say = Callable[..., None]


def main() -> None:
    """Carry out order by order."""
    say = _speaker()
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=[lines], daemon=True).start()
    client()  # imports it, and has it guarded
    say(ready=True)
    listings: dict[Path, file_state.FileState | None] = {}
    while True:
        order = json.loads(lines.get())
        say(**(_fetch(order, say, lines, listings) if order["order"] == "fetch" else _commit(order, say)))


def _speaker() -> Say:
    """The function that sends a message over what was stdout; whatever else prints goes to stderr."""
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    lock = threading.Lock()
    os.dup2(2, 1)

    def say(**message: Any) -> None:
        with lock:
            pipe.write(json.dumps(message) + "\n")
            pipe.flush()

    return say


def _listen(lines: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        lines.put(line)
    os._exit(1)


# ------------------------------------------------------------ fetch


def _fetch(
    order: dict[str, Any],
    say: Say,
    lines: queue.SimpleQueue[str],
    listings: dict[Path, file_state.FileState | None],
) -> dict[str, Any]:
    """Plan, wait for the parent's word, and fetch; `listings` are the lists of files that this process has kept."""
    from huggingface_hub import constants, snapshot_download

    constants.DOWNLOAD_CHUNK_SIZE = CHUNK
    constants.FILELOCK_LOG_EVERY_SECONDS = 1  # seconds after which it says that it waits for another process
    _report_warnings(say)
    # Another list may be of a client that nobody guarded; its hashes are paths for this one.
    kept = hf_cache.repository_folder(order["repo_id"]) / "trees" / f"{order['commit']}.json"
    if file_state.state_of(kept) != listings.get(kept):
        kept.unlink(missing_ok=True)
    arguments: dict[str, Any] = {
        "revision": order["commit"],
        "allow_patterns": [escape(name) for name in order["sizes"]],
        "cache_dir": cache_dir(),
        "endpoint": endpoint(),
        "token": token() or False,
        "library_name": "lora-fuse",
        "force_download": order["again"],
        "max_workers": order["workers"],
        "tqdm_class": _progress_reporter(say),
    }
    try:
        files = snapshot_download(order["repo_id"], dry_run=True, **arguments)
        say(plan=[[file.filename, file.file_size or 0, file.will_download] for file in files])
        lines.get()
        folder = snapshot_download(order["repo_id"], **arguments)
        listings[kept] = file_state.state_of(kept)
        return {"result": str(folder)}
    except Exception as error:  # the client raises anything where an answer is none  # noqa: BLE001
        return {"failed": _fetch_failure(error, order["repo_id"])}


def _progress_reporter(say: Say) -> type[Any]:
    """A progress bar for the client that shows nothing and reports to the parent."""
    from huggingface_hub.utils.tqdm import tqdm

    class Reporter(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.what = kwargs.get("name")
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            say(**{KINDS.get(str(self.what), "finished"): n})
            return super().update(n)

    return Reporter


def _report_warnings(say: Say) -> None:
    """Send the client's warnings, which say why it waits, and its INFO that it waits for another process's lock."""
    from huggingface_hub.utils import logging as client_logging

    class Reporter(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING:
                if not record.getMessage().startswith("Retrying in"):  # the warning before it says why
                    say(note=record.getMessage())
            elif "waiting to acquire lock" in record.getMessage():
                say(waiting=True)

    logger = client_logging.get_logger()
    logger.handlers[:] = [Reporter()]
    logger.setLevel(logging.INFO)


def _fetch_failure(error: BaseException, repo_id: str) -> dict[str, Any]:
    """The arguments of an `AttemptFailed`, and whether the disk is full.

    The client tries again by itself where it wraps the error or asks its API; not where it gets a file and the answer
    is a status.
    """
    without_xet = isinstance(error, RuntimeError) or type(error) is ConnectionError
    is_status = getattr(error, "response", None) is not None
    again = (is_status and is_passing(error) and not is_from_api(error)) or SHORT in str(error) or without_xet
    return {
        "reason": explain(error, repo_id),
        "pause": requested_pause(error, 0.0) if again else None,
        "without_xet": without_xet,
        "full": is_full_disk(cause(error)),
    }


# ------------------------------------------------------------ commit


def _commit(order: dict[str, Any], say: Say) -> dict[str, Any]:
    """Send one commit; the result is the number of the pull request that it opened, if it did."""
    from httpx2 import HTTPError
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not order["bars"]:
        disable_progress_bars()
    threading.Thread(target=_beat, args=[say], daemon=True).start()
    repo_id = order["repo_id"]
    revision = order["revision"]
    additions = [CommitOperationAdd(name, path) for name, path in sorted(order["paths"].items())]
    if is_without_xet():  # which would hash what it sends as it sends it; without, the client hashes one by one
        infos = [addition.upload_info for addition in additions]
        file_state.in_threads(lambda info, _: info.sha256, infos, lambda _: None, lambda info: info.size)
    try:
        number = PUBLISH.call(
            f"publishing to {repo_id}",
            repo_id,
            lambda: (
                client()
                .create_commit(
                    repo_id,
                    additions,
                    commit_message=order["title"],
                    commit_description=order["description"],
                    revision=revision,
                    create_pr=revision is None,
                    parent_commit=order["parent"],
                )
                .pr_num
            ),
            within=math.inf,  # whoever gave the order watches what moves
        )
    except Refused as error:
        pause = PUBLISH.pause_after(error.__cause__, 1.0)
        without_xet = not isinstance(error.__cause__, (HTTPError, ValueError))
        return {"failed": {"reason": str(error), "pause": pause, "without_xet": without_xet, "full": False}}
    return {"result": number}


def _beat(say: Say) -> None:
    """Tell the parent twice a second how many bytes moved over the wire, or were read from a large file."""
    wire: dict[str, int] = {}
    read = 0
    while True:
        wire_now = bytes_on_the_wire()
        read_now = bytes_read()
        moved = sum(max(count - wire.get(name, 0), 0) for name, count in wire_now.items())
        if read_now - read > READ:
            moved += read_now - read
        if moved:
            say(moved=moved)
        wire = wire_now
        read = read_now
        time.sleep(BEAT)


def bytes_on_the_wire() -> dict[str, int]:
    """Bytes that each connection of this process has sent and received; where that is not known, a growing number."""
    if sys.platform != "linux":
        return {"": time.monotonic_ns()}
    totals = {}
    for entry in list(os.scandir("/proc/self/fd")):
        try:
            target = str(Path(entry.path).readlink())
            if not target.startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry.name))) as connection:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, BYTES_ACKED + 16)
        except OSError:  # it was closed meanwhile, or is no TCP connection
            continue
        if len(info) == BYTES_ACKED + 16:
            totals[target] = sum(struct.unpack_from("QQ", info, BYTES_ACKED))
    return totals


def bytes_read() -> int:
    """Bytes that this process has read: it may be busy with a large file before it sends any of it."""
    if sys.platform != "linux":
        return 0
    return int(Path("/proc/self/io").read_text(encoding="ascii").split()[1])


if __name__ == "__main__":
    interrupts.install(interrupts.KEPT)
    with interrupts.hooked():
        main()
