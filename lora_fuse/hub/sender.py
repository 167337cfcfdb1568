"""The process that sends: ``python -m lora_fuse.hub.sender``, one commit, read as JSON from standard input.

It is a process of its own because the client cannot be interrupted: neither its HTTP calls nor its Xet transfers have
an end of their own when a Hub falls silent. While bytes move, it says so on standard output, twice a second; the last
line is the outcome. It never outlives the process that started it.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import socket
import struct
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

from lora_fuse.errors import Refused
from lora_fuse.hub.client import bars_on_a_terminal, client
from lora_fuse.hub.retry import call, pause_after, redacted

BEAT = 0.5  # seconds
READ = 1 << 16  # bytes; what looking for movement reads itself is far below
PR_SET_PDEATHSIG = 1  # linux/prctl.h
BYTES_ACKED = 120  # offset in struct tcp_info (linux/tcp.h): bytes that the other side has, and bytes received


def main() -> int:
    """Send what standard input says; beats and the outcome go to what was standard output."""
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    outcome = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # nothing that a library prints may look like an outcome
    threading.Thread(target=_beat, args=(outcome,), daemon=True).start()
    result = _send(json.load(sys.stdin))
    outcome.write(json.dumps(result) + "\n")
    return 0 if "error" not in result else 1


def _send(job: dict[str, Any]) -> dict[str, Any]:
    from huggingface_hub import CommitOperationAdd

    for handler in logging.getLogger("huggingface_hub").handlers:
        handler.addFilter(_redact)
    additions = [CommitOperationAdd(name, path) for name, path in sorted(job["paths"].items())]
    repo_id, revision = job["repo_id"], job["revision"]
    try:
        with bars_on_a_terminal():
            made = call(
                f"publishing to {repo_id}",
                repo_id,
                lambda: client().create_commit(
                    repo_id,
                    additions,
                    commit_message=job["title"],
                    commit_description=job["description"],
                    revision=revision,
                    create_pr=revision is None,
                    parent_commit=job["parent"],
                ),
            )
    except Refused as error:
        over_xet = not isinstance(error.__cause__, _http_errors())
        return {"error": str(error), "pause": pause_after(error.__cause__, 1.0), "over_xet": over_xet}
    return {"pull": made.pr_num}


def _http_errors() -> tuple[type[BaseException], ...]:
    from httpx2 import HTTPError

    return (HTTPError, ValueError)


def _redact(record: logging.LogRecord) -> bool:
    record.msg, record.args = redacted(record.getMessage()), ()
    return True


def _die_with_parent() -> None:
    """prctl(2); elsewhere than on Linux a parent that is killed leaves this process to finish its commit."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _beat(outcome: IO[str]) -> None:
    wire, read = 0, 0
    while True:
        seen, held = moved(), read_bytes()
        if seen != wire or held - read > READ:
            outcome.write("\n")
        wire, read = seen, held
        time.sleep(BEAT)


def moved() -> int:
    """Bytes that this process's connections have sent and received; where that is not known, a number that changes."""
    if sys.platform != "linux":
        return time.monotonic_ns()
    total = 0
    for entry in list(os.scandir("/proc/self/fd")):
        try:
            if not str(Path(entry.path).readlink()).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry.name))) as connection:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, BYTES_ACKED + 16)
        except OSError:  # it was closed meanwhile, or is no TCP connection
            continue
        if len(info) == BYTES_ACKED + 16:
            total += sum(struct.unpack_from("QQ", info, BYTES_ACKED))
    return total


def read_bytes() -> int:
    """Bytes that this process has read: it may be busy with a large file before it sends any of it."""
    if sys.platform != "linux":
        return 0
    return int(Path("/proc/self/io").read_text(encoding="ascii").split()[1])


if __name__ == "__main__":
    sys.exit(main())
