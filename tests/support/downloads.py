"""The download stage as a user runs it, in a process of its own."""

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.hub_server import Call, LoopbackHub
from tests.support.composed import tree_of
from tests.support.machine import ROOT, start
from tests.support.repositories import PIPELINE, write

BASE, LORA, FILE = "bob/base", "bob/lora", "lora.safetensors"
CONTENT = "GET (/_lfs/|/cas/xorb/)"
BIG = os.urandom(3_000_000)
LIMIT = 60  # seconds that no run may take, whatever happens


class Project:
    """A folder in which the download stage is run as a user runs it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "conf").symlink_to(ROOT / "conf")
        write(root / "base", PIPELINE)
        self.params = tree_of()
        self.set(path=str(root / "base"))
        self.set_lora()

    def set(self, *, path: str | None = None, repo_id: str | None = None, revision: str | None = None) -> None:
        self.params["base"] = self.params["base"] | {"path": path, "repo_id": repo_id, "revision": revision}

    def set_lora(self, filename: str = FILE, repo_id: str = LORA, revision: str = "main") -> None:
        lora = {"filename": filename, "path": None, "repo_id": repo_id, "revision": revision}
        self.params["loras"] = {"l": lora}

    def start(self, *arguments: str, stall: float = 2.5, workers: int = 4, **env: str) -> subprocess.Popen[str]:
        self.params["download"] = {"workers": workers, "stall_seconds": stall}
        (self.root / "params.yaml").write_text(yaml.safe_dump(self.params))
        return start(sys.executable, "-m", "stages.download", *arguments, cwd=self.root, **env)

    def run(self, *arguments: str, code: int = 0, **options: Any) -> str:
        """Run it; returns its output, or its one error line if it was to be refused."""
        process = self.start(*arguments, **options)
        try:
            out, err = process.communicate(timeout=LIMIT)
        finally:
            process.kill()
        assert process.returncode == code, f"exit {process.returncode}\n{out}\n{err}"
        assert "Traceback" not in err
        assert not re.search(r"hf_(write|read|expired)", out + err)
        if code == 0:
            return out + err
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, err
        assert err.splitlines()[-1] == errors[0]
        return errors[0]

    def refused(self, *arguments: str, **options: Any) -> str:
        before = self.locks()
        line = self.run(*arguments, code=2, **options)
        assert self.locks() == before
        return line

    def locks(self) -> dict[str, str]:
        return {path.name: path.read_text() for path in self.root.glob("artifacts/*.lock.json")}

    def lock(self, name: str = "lora") -> dict[str, Any]:
        found = json.loads(self.locks()[f"{name}.lock.json"])
        lock: dict[str, Any] = found["base"] if name == "base" else found["loras"]["l"]
        return lock


def fetched(hub: LoopbackHub) -> list[Call]:
    return [call for call in hub.log if re.search(CONTENT, call.line)]


def leftovers() -> list[Path]:
    return list(Path(os.environ["HF_HOME"]).rglob("*.incomplete"))


def processes(word: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            environment = (path.parent / "environ").read_bytes()
            if word.encode() in path.read_bytes() and os.environ["HF_HOME"].encode() in environment:
                found.append(path.parent.name)
    return found
