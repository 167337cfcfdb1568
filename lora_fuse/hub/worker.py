"""``python -m lora_fuse.hub.worker``: the Hub client's transfer as a process of its own, which can be killed.

A transfer that stalls inside the client cannot be interrupted from within: Xet waits in Rust, HTTP in a thread. So
`lora_fuse.hub.transfer` runs this, watches and kills it. Orders come in on stdin, one JSON object a line; JSON lines go
out on stdout: ``ready``, ``plan`` (then a line on stdin says to go on), ``moved`` and ``done`` bytes, ``note``,
``waiting``, and for each order in the end ``folder`` or ``failed``. When stdin ends, whoever asked is gone, and so is
this process.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import sys
import threading
from collections.abc import Callable
from glob import escape
from typing import Any

from lora_fuse.hub.client import endpoint, token
from lora_fuse.hub.error_texts import cause, explain, is_full_disk, is_passing
from lora_fuse.recipe import hf_cache

CHUNK = 1 << 20  # bytes after which the client writes and reports; its own 10 MB hide a slow connection's progress
WRITTEN = "huggingface_hub.snapshot_download"  # the client's name for its bar of bytes written to disk
SHORT = "Consistency check failed"  # the client's words for a body that ends early

Say = Callable[..., None]


def main() -> None:
    """Fetch what is asked for, order by order."""
    say, lines = _speaker(), queue.SimpleQueue[str]()
    threading.Thread(target=_listen, args=[lines], daemon=True).start()
    from httpx2 import HTTPError

    _report_the_client_s_words(say)
    say(ready=True)
    while True:
        order = json.loads(lines.get())
        try:
            say(folder=_fetch(order, say, lines))
        except (HTTPError, OSError, RuntimeError, ValueError) as error:  # as in `failures.client_errors`
            say(failed=_failure(error, order["repo_id"]))


def _fetch(order: dict[str, Any], say: Say, lines: queue.SimpleQueue[str]) -> str:
    from huggingface_hub import constants, snapshot_download

    constants.DOWNLOAD_CHUNK_SIZE = CHUNK
    constants.FILELOCK_LOG_EVERY_SECONDS = 1  # seconds after which it says that it waits for another process
    arguments: dict[str, Any] = {
        "revision": order["commit"],
        "allow_patterns": [escape(name) for name in order["names"]],
        "cache_dir": hf_cache.cache_dir(),
        "endpoint": endpoint(),
        "token": token() or False,
        "library_name": "lora-fuse",
        "force_download": order["again"],
        "max_workers": order["workers"],
        "tqdm_class": _bars(say),
    }
    found = snapshot_download(order["repo_id"], dry_run=True, **arguments)
    say(plan=[[file.filename, file.file_size or 0, file.will_download] for file in found])
    lines.get()
    return str(snapshot_download(order["repo_id"], **arguments))


def _bars(say: Say) -> type[Any]:
    """The client's progress bars, not shown but told."""
    from huggingface_hub.utils.tqdm import tqdm

    class Told(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.what = kwargs.get("name")
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            say(**{"done" if self.what == WRITTEN else "moved": n})
            return super().update(n)

    return Told


def _report_the_client_s_words(say: Say) -> None:
    """Its warnings say why it is waiting; that it waits for another process's lock, it says as INFO."""
    from huggingface_hub.utils import logging as client_logging

    class Told(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING:
                if not record.getMessage().startswith("Retrying in"):  # why, it has said before
                    say(note=record.getMessage())
            elif "waiting to acquire lock" in record.getMessage():
                say(waiting=True)

    logger = client_logging.get_logger()
    logger.handlers[:] = [Told()]
    logger.setLevel(logging.INFO)


def _failure(error: BaseException, repo_id: str) -> dict[str, Any]:
    """What `transfer` has to know: the reason, and whether another try may help.

    The client tries again by itself where it wraps the error or asks its API; not where it gets a file and the answer
    is a status.
    """
    status = getattr(error, "response", None)
    asked = str(status.request.url) if status is not None else ""
    from_api = asked.startswith(f"{endpoint()}/api/")
    return {
        "reason": explain(error, repo_id),
        "full": is_full_disk(cause(error)),
        "again": (status is not None and is_passing(error) and not from_api) or SHORT in str(error),
        "xet": isinstance(error, RuntimeError) or (type(error) is ConnectionError),
    }


def _speaker() -> Say:
    """Say one JSON object on what was stdout; whatever else prints goes to stderr."""
    pipe, lock = os.fdopen(os.dup(1), "w", encoding="utf-8"), threading.Lock()
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


if __name__ == "__main__":
    main()
