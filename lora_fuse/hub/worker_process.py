"""The process of `lora_fuse.hub.worker` as its parent sees it: started, asked, heard with a time limit, killed.

The Hub client cannot be interrupted from within: Xet waits in Rust, HTTP in a thread, and neither has an end of its
own when a Hub falls silent. So the client transfers in a process of its own, which is killed when nothing moves for
as long as its parent bears.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]  # the folder of this package, for the process's import path
# Xet's own are derived from the machine's memory, GB of them: a download must fit where little is free (hf-xet 1.8).
BUFFERS = {
    "HF_XET_RECONSTRUCTION_DOWNLOAD_BUFFER_SIZE": "256mb",
    "HF_XET_RECONSTRUCTION_DOWNLOAD_BUFFER_PERFILE_SIZE": "64mb",
    "HF_XET_RECONSTRUCTION_DOWNLOAD_BUFFER_LIMIT": "768mb",
}
START = 60.0  # seconds that the process may take to begin, if it may be silent for less


class AttemptFailed(Exception):
    """One attempt at a transfer failed.

    Attributes:
        pause: seconds after which the same may be tried again at the earliest; None if that would not help.
        without_xet: whether it may help to try without Xet.
        stalled: whether it failed because nothing moved any more.
    """

    def __init__(
        self, reason: str, *, pause: float | None = None, without_xet: bool = False, stalled: bool = False
    ) -> None:
        super().__init__(reason)
        self.pause = pause
        self.without_xet = without_xet
        self.stalled = stalled


class WorkerProcess:
    """A running `lora_fuse.hub.worker`, which may be silent for `stall_seconds`."""

    def __init__(self, stall_seconds: float, *, xet: bool, shows_stderr: bool = False) -> None:
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        without = {} if xet else {"HF_HUB_DISABLE_XET": "1"}
        self._stderr = None if shows_stderr else tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lora_fuse.hub.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env={**BUFFERS, "HF_HUB_DISABLE_TELEMETRY": "1", **os.environ, "PYTHONPATH": path, **without},
            text=True,
            start_new_session=True,  # Ctrl-C is for the parent, which ends it
        )
        self._stall_seconds = stall_seconds
        self._is_ready = False  # it has sent a message
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._process.stdout or ():
            self._lines.put(line)
        self._lines.put("")

    @property
    def stall_seconds(self) -> float:
        """Seconds that it may be silent for now; until it has begun, at least `START`."""
        return self._stall_seconds if self._is_ready else max(START, self._stall_seconds)

    def send(self, message: object) -> None:
        """Send a line of JSON.

        Raises:
            EOFError: the process has ended.
        """
        if self._process.stdin is None:
            raise EOFError
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise EOFError from error

    def receive(self, timeout: float) -> dict[str, Any]:
        """The next message; empty if none comes for `timeout` seconds.

        Raises:
            EOFError: the process has ended.
        """
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            return {}
        if not line:
            raise EOFError
        message: dict[str, Any] = json.loads(line)
        self._is_ready = True
        return message

    def ending(self) -> str:
        """Exit status, with the last line that the process printed."""
        code = self._process.wait()
        if self._stderr is None:
            return f"ended with {code}"
        self._stderr.seek(0)
        lines = self._stderr.read().strip().splitlines()
        return f"ended with {code} ({lines[-1] if lines else 'it said nothing'})"

    def close(self) -> None:
        """Kill the process, and wait for its end."""
        self._process.kill()
        self._reader.join()  # it must not read from a pipe that is closed
        with self._process, suppress(BrokenPipeError):
            pass
        if self._stderr is not None:
            self._stderr.close()
