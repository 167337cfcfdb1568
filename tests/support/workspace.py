"""Checkouts of the project, and commands run in them as a user runs them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_fuse.checkpoint.header import Header
from lora_fuse.checkpoint.shards import open_checkpoint

ROOT = Path(__file__).resolve().parents[2]
MERGED = Path("artifacts/merged")
METRICS = "artifacts/regression/metrics.json"
STAGES = ["download", "fuse", "verify", "regress", "gate"]


class Workspace:
    """A git checkout of the project as it stands, and commands run in it as a user runs them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
        for name in filter(None, names):
            if (ROOT / name).exists():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, root / name)
        (root / "artifacts/golden").mkdir(parents=True, exist_ok=True)
        for command in (["init", "-q"], ["config", "user.name", "t"], ["config", "user.email", "t@example.org"]):
            self.run("git", *command)
        self.commit("start")

    def commit(self, message: str) -> None:
        self.run("git", "add", "-A")
        self.run("git", "commit", "-qm", message)

    def run(
        self, *command: str, code: int | None = 0, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command, cwd=self.root, env={**self.env, **(env or {})}, capture_output=True, text=True, check=False
        )
        assert code is None or done.returncode == code, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def config(self, *overrides: str) -> None:
        self.run(sys.executable, "-m", "stages.config", *overrides)

    def repro(self, *arguments: str, code: int = 0, env: Mapping[str, str] | None = None) -> str:
        done = self.run("dvc", "repro", *arguments, code=code, env=env)
        return done.stdout + done.stderr

    def stage(self, name: str, *arguments: str, code: int = 0) -> str:
        done = self.run(sys.executable, "-m", f"stages.{name}", *arguments, code=code)
        return done.stdout + done.stderr

    @property
    def goldens(self) -> Path:
        """Of the last run's environment."""
        return self.root / "artifacts/golden/pocket" / str(self.read(METRICS)["environment"])

    def read(self, name: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.root / name).read_text())
        return content

    def fused(self) -> dict[str, str]:
        files = self.read("artifacts/merged.manifest.json")["files"]
        return {name: file["sha256"] for name, file in files.items() if file["from"] == "fused"}

    def data(self) -> dict[str, bytes]:
        """The fused files without their headers."""
        return {
            name: (self.root / MERGED / name).read_bytes()[len(header.raw) :] for name, header in self.headers().items()
        }

    def headers(self) -> dict[str, Header]:
        shards = open_checkpoint(self.root / MERGED, "transformer").shards
        return {shard.relative: shard.header for shard in shards}


def ran(output: str) -> list[str]:
    return [stage for stage in STAGES if f"Running stage '{stage}'" in output]
