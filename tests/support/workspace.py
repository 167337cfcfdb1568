"""Checkouts of the project, and commands run in them as a user runs them."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import chdir
from pathlib import Path
from typing import Any, Self

from lora_fuse.checkpoint.header import Header
from lora_fuse.checkpoint.shards import open_checkpoint
from stages.config.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
MERGED = Path("artifacts/merged")
METRICS = "artifacts/regression/metrics.json"
STAGES = ["download", "fuse", "verify", "regress", "gate"]
COMPILED = {".pyc", ".nbi", ".nbc"}  # Python's and numba's; both are valid for a source with the same time


class Workspace:
    """A git checkout of the project, and commands run in it as a user runs them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

    @classmethod
    def checkout(cls, root: Path) -> Self:
        """Make a checkout of the project as it stands, with the code that is compiled already."""
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
        files = {ROOT / name for name in names if name and (ROOT / name).exists()}
        caches = {path.parent / "__pycache__" for path in files if path.suffix == ".py"}
        files |= {path for cache in caches for path in cache.glob("*") if path.suffix in COMPILED}
        for file in files:
            copy = root / file.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, copy)
        (root / "artifacts/golden").mkdir(parents=True, exist_ok=True)
        workspace = cls(root)
        for command in (["init", "-q"], ["config", "user.name", "t"], ["config", "user.email", "t@example.org"]):
            workspace.run("git", *command)
        workspace.commit("start")
        return workspace

    @classmethod
    def built(cls, root: Path) -> Self:
        """Build the default recipe in a checkout; the gate is passed.

        Where nobody has approved its pictures for this very environment, they are approved in this checkout.
        """
        workspace = cls.checkout(root)
        done = workspace.run("dvc", "repro", code=None)
        output = done.stdout + done.stderr
        assert ran(output) in (STAGES, STAGES[:-1]), output  # the gate has passed these very results, says dvc.lock
        if done.returncode:
            assert "exited with 3" in output or "exited with 4" in output, output
            workspace.stage("approve", "--reason", "what this checkout makes")
            workspace.commit("goldens")
            assert ran(workspace.repro()) == ["regress", "gate"]
        return workspace

    def copy(self, root: Path) -> Self:
        """Copy it with all results, links and times, so that nothing has to be built again."""
        subprocess.run(["cp", "-a", str(self.root), str(root)], check=True)
        copied = type(self)(root)
        copied.env = dict(self.env)
        return copied

    def clone(self, root: Path) -> Self:
        """Clone its commits: what another machine has, with no results and no file of the Hub."""
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
        self.run("git", "clone", "-q", *identity, str(self.root), str(root))
        cloned = type(self)(root)
        cloned.env = {**self.env, "HF_HOME": str(root.parent / f"{root.name}-hf")}
        return cloned

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

    def dvc_config(self, text: str) -> None:
        """Write what only this machine's DVC is to know."""
        (self.root / ".dvc/config.local").write_text(text)

    def config(self, *overrides: str) -> None:
        """Compile its `conf/`, in this process."""
        with chdir(self.root):
            main(overrides)

    def repro(self, *arguments: str, code: int = 0, env: Mapping[str, str] | None = None) -> str:
        done = self.run("dvc", "repro", *arguments, code=code, env=env)
        return done.stdout + done.stderr

    def status(self, *targets: str) -> dict[str, Any]:
        """What DVC finds changed of each stage."""
        found: dict[str, Any] = json.loads(self.run("dvc", "status", "--json", *targets).stdout)
        return found

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
    """The stages of the main pipeline that DVC says it ran."""
    return [stage for stage in STAGES if f"Running stage '{stage}'" in output]


def hub_environment() -> dict[str, str]:
    """The variables by which a process finds the Hub of the `hub` fixture."""
    return {name: os.environ[name] for name in ("HF_ENDPOINT", "HF_HOME", "HF_TOKEN")}
