"""The process of `hub.worker`, from outside: started, spoken to, listened to with a time limit, and killed."""

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

ROOT = Path(__file__).resolve().parents[2]  # where the process finds this package


class ClientProcess:
    """The process; `plain` keeps it from using Xet. It has begun (`is_ready`) when it has said something."""

    def __init__(self, *, plain: bool) -> None:
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        without = {"HF_HUB_DISABLE_XET": "1"} if plain else {}
        self._stderr = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lora_fuse.hub.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env={"HF_HUB_DISABLE_TELEMETRY": "1", **os.environ, "PYTHONPATH": path, **without},
            text=True,
            start_new_session=True,  # Ctrl-C is for the parent, which ends it
        )
        self.is_ready = False
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout or ():
            self._lines.put(line)
        self._lines.put("")

    def tell(self, line: str) -> None:
        """Say something to it.

        Raises:
            EOFError: it has ended.
        """
        if self._process.stdin is None:
            raise EOFError
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise EOFError from error

    def hear(self, timeout: float) -> dict[str, Any]:
        """The next thing that it says, or nothing for a moment.

        Raises:
            EOFError: it has ended.
        """
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            return {}
        if not line:
            raise EOFError
        message: dict[str, Any] = json.loads(line)
        self.is_ready = True
        return message

    def last_words(self) -> str:
        """How it ended, with the last line that it or its libraries printed."""
        code = self._process.wait()
        self._stderr.seek(0)
        said = self._stderr.read().strip().splitlines()
        return f"ended with {code} ({said[-1] if said else 'it said nothing'})"

    def end(self) -> None:
        """Kill it, and wait for that."""
        self._process.kill()
        with self._process, self._stderr, suppress(BrokenPipeError):
            pass
