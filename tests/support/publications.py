"""The stage that publishes, in a process of its own, from a folder in which everything is built and checked."""

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import numpy as np
import yaml

from lora_fuse.hub import Receipt
from lora_fuse.machine.files import hash_file
from lora_fuse.machine.parsing import parse_yaml
from lora_fuse.recipe.paths import Artifacts
from lora_fuse.recipe.recipe import Recipe
from lora_fuse.recipe.records import BuildRecord, Lock, Manifest, MergedFile, MergedLora, Tool, from_json, to_json
from stages.config import load
from stages.publish import publish
from tests.hub_server import LoopbackHub, Repo
from tests.hub_server.api import LFS_SUFFIXES
from tests.support.approved import weight_check
from tests.support.machine import ROOT, start, until
from tests.support.released import leave_regression

REPO = "alice/merged"
SHARDS = [f"transformer/model-{number}.safetensors" for number in range(1, 5)]
VOCABULARY = "tokenizer/spiece.model"
SIZE = 200_000  # bytes of a shard
XORBS, PUTS, COMMIT, MERGE, TAG = (
    r"POST /cas/\w+/xorbs/",
    "PUT /_lfs/",
    "POST .*/commit/",
    "POST .*/merge$",
    "POST .*/tag/",
)

PICTURES = 5  # large files by their name: two cases with their inputs, and the plot of the blocks
BOUND = 90.0  # seconds that no run may take
ONE_BY_ONE = """
from lora_fuse.hub import pull_request
pull_request.BATCH = 1
from stages.run import run_stage
from stages.publish import publish
run_stage(publish)
"""


@dataclass
class Done:
    """How a process ended."""

    code: int
    out: str
    err: str

    @property
    def refusal(self) -> str:
        """The one line that it was refused with."""
        assert self.code == 2, self.out + self.err
        assert "Traceback" not in self.out + self.err
        (line,) = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert self.err.splitlines()[-1] == line
        return line


@dataclass
class Place:
    """A project's folder in which everything is built and checked, and the commands that publish from there."""

    root: Path
    env: dict[str, str] = field(default_factory=dict)

    def fill(self, seed: int = 0) -> None:
        """Lay down a checkpoint with its manifest and the records of its checks."""
        files = {"model_index.json": b'{"_class_name": "P"}\n'}
        files[VOCABULARY] = b"large by its name\0"
        for number, name in enumerate(SHARDS):
            files[name] = np.random.default_rng([seed, number]).bytes(SIZE)
        records = {}
        for name, content in files.items():
            path = self.root / "artifacts/merged" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            records[name] = MergedFile(len(content), hashlib.sha256(content).hexdigest(), "fused")
        locks = {name: self._lock(name) for name in ("base", "lightning")}
        lora = MergedLora("lightning", 1.0, locks["lightning"].files["lightning"].sha256, "lightning", path=".")
        text = to_json(Manifest(1, "pocket", locks["base"], (lora,), 1.0, 12, records))
        Artifacts(self.root / "artifacts").write_locks(locks.pop("base"), locks)
        (self.root / "artifacts/merged.manifest.json").write_text(text)
        key = hashlib.sha256(text.encode()).hexdigest()
        build = BuildRecord(1, key, Tool("1.2.3"), "2026-01-01T00:00:00Z", "cpu", len(SHARDS) * SIZE, 1.0)
        (self.root / "artifacts/merged.build.json").write_text(to_json(build))
        (self.root / "artifacts/verify.json").write_text(json.dumps(weight_check(key, targets=12)))
        if not (self.root / "pocket").exists():
            (self.root / "pocket").symlink_to(ROOT / "pocket")  # its pictures are the cases' inputs
        with contextlib.chdir(self.root):
            leave_regression(Recipe.parse(parse_yaml((ROOT / "params.yaml").read_text()), "params.yaml"))

    def _lock(self, name: str) -> Lock:
        """Lay down a file of that name, and pin it."""
        (self.root / name).write_text(name)
        return Lock(None, ".", None, None, {name: hash_file(self.root / name)})

    def configure(self, **publish: object) -> None:
        """Write params.yaml with these settings of `publish`."""
        params = parse_yaml((ROOT / "params.yaml").read_text())
        unsigned = {"license": "apache-2.0", "signing": {"key": None, "keyless": False}}
        params["publish"] = {
            "enabled": True,
            "repo_id": REPO,
            "weights": "full",
            "private": True,
            "tag": None,
            **unsigned,
            **publish,
        }
        (self.root / "params.yaml").write_text(yaml.safe_dump(params))

    def start(self, *arguments: str, **env: str) -> subprocess.Popen[str]:
        program = arguments or ("-m", "stages.publish")
        return start(sys.executable, *program, cwd=self.root, **{**self.env, **env})

    def run(self, *arguments: str, **env: str) -> Done:
        return finish(self.start(*arguments, **env))

    @property
    def manifest(self) -> Manifest:
        return from_json(Manifest, (self.root / "artifacts/merged.manifest.json").read_text(), "manifest")

    @property
    def receipt(self) -> Receipt:
        return from_json(Receipt, (self.root / "artifacts/publish.json").read_text(), "receipt")


def finish(process: subprocess.Popen[str]) -> Done:
    """Wait for the end; a run that hangs fails here."""
    try:
        out, err = process.communicate(timeout=BOUND)
    finally:
        process.kill()
    return Done(process.returncode, out, err)


def repo(hub: LoopbackHub) -> Repo:
    return hub.registry.repos[REPO]


def is_untouched(hub: LoopbackHub) -> bool:
    return repo(hub).head.tree.keys() == {".gitattributes"}


def check_published(place: Place, hub: LoopbackHub) -> None:
    """Everything is on main and nothing else, and the receipt says so."""
    manifest, receipt, head = place.manifest, place.receipt, repo(hub).head
    assert head.tree.keys() == {*receipt.files, ".gitattributes"}
    assert {*manifest.files, "README.md", "lora_fuse.json"} < receipt.files.keys()
    for name, file in manifest.files.items():
        assert hashlib.sha256(hub.read(REPO, name)).hexdigest() == file.sha256
        assert receipt.files[name].sha256 == file.sha256
    assert (receipt.status, receipt.commit, receipt.private) == ("published", head.oid, True)
    assert repo(hub).pulls[receipt.pull_request or 0].merge_commit == head.oid


def large(place: Place) -> int:
    """Bytes of what goes to LFS or Xet, of the last publication."""
    return sum(file.size for name, file in place.receipt.files.items() if name.endswith(LFS_SUFFIXES))


def check_next_run(place: Place, hub: LoopbackHub, *, sends: int | None = 0) -> None:
    """The faults are over: the next run finishes, and sends no more than it has to. It is in this process."""
    hub.faults.clear()
    before = hub.uploaded()
    with contextlib.chdir(place.root), patch.dict(os.environ, place.env):
        assert publish(load()) == 0
    check_published(place, hub)
    if sends is not None:
        overhead = 2000 if sends else 0  # of xorbs; the content is random and cannot be compressed
        assert sends <= hub.uploaded() - before <= sends + overhead


def killed_when(place: Place, hub: LoopbackHub, pattern: str, done: int, *arguments: str) -> None:
    """Start a run and kill it, with SIGKILL, when so many requests have been answered and one more is under way.

    Its helper must not outlive it.
    """

    def is_time() -> bool:
        asked = [call for call in hub.log if re.search(pattern, call.line)]
        return len(asked) > done and len([call for call in asked if call.status == 200]) == done

    process = place.start(*arguments)
    until(is_time)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=20)  # a helper that lives on holds the pipes
    assert process.returncode == -signal.SIGKILL
    until(lambda: not any(Path(f"/proc/{child}").exists() for child in children), seconds=5)


def rows(done: Done) -> dict[str, tuple[str, int, str]]:
    found = re.findall(r"^(\w+) +(\d+) ([0-9a-f]{64}) (.+)$", done.out, re.MULTILINE)
    return {name: (state, int(size), sha256) for state, size, sha256, name in found}
