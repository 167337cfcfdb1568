"""A base fused while it arrives from a Hub: the bytes of a fuse from disk, each fetched once, none of them kept.

What the wire and a lying Hub do to single ranges is in `test_streamed_faults`.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import lora_fuse
from lora_fuse.cli import main
from lora_fuse.errors import BadSource
from lora_fuse.fusion import read_manifest
from lora_fuse.hub import lock_base, streamed_base
from lora_fuse.hub.streaming import arriving_file, remote_file
from lora_fuse.lora.inputs import LoraInput
from lora_fuse.recipe import hf_cache, paths
from lora_fuse.recipe.paths import HERE
from stages.config import load
from stages.download import download
from stages.fuse import fuse
from stages.run import next_commands
from stages.verify import verify
from tests.hub_server import Fault, LoopbackHub
from tests.support import merges, tiny
from tests.support.machine import ROOT, until

REPO = "alice/base"
STORED = "GET /_lfs/"
SHARD = 2 * 2 * merges.LINEAR[0] * merges.LINEAR[1]  # bytes of the data
OFTEN = (0.01, 0.01, 0.01)


class Place:
    """A base of six shards and a VAE on the Hub, and a LoRA for it here."""

    def __init__(self, root: Path, hub: LoopbackHub) -> None:
        self.root = root
        self.hub = hub
        self.lora = merges.write_lora(root / "l.safetensors")
        self.out = root / "out"
        rng = np.random.default_rng(1)
        tensors: dict[str, tiny.Array] = {}
        for block in range(merges.SHARDS):
            for name in ("to_q", "to_r"):
                tensors[f"blocks.{block}.{name}.weight"] = rng.standard_normal(merges.LINEAR).astype(tiny.BF16)
        self.base = tiny.write_pipeline(root / "base", tensors, merges.SHARDS)
        self.commit = self.push({path.relative_to(self.base).as_posix(): path.read_bytes() for path in self.files})
        self.weights = sum(path.stat().st_size for path in self.files if path.suffix == ".safetensors")

    @property
    def files(self) -> list[Path]:
        return [path for path in sorted(self.base.rglob("*")) if path.is_file()]

    def push(self, content: dict[str, bytes]) -> str:
        self.commit = self.hub.push(REPO, dict(content)).oid
        return self.commit

    @property
    def name(self) -> str:
        return f"hf://{REPO}@{self.commit}"

    def stored(self, number: int) -> str:
        """The request for a shard of the transformer."""
        name = f"transformer/diffusion_pytorch_model-{number:05d}-of-{merges.SHARDS:05d}.safetensors"
        return f"{STORED}{self.hub.registry.repos[REPO].at(self.commit).tree[name].sha256}"

    def fuse(self, *options: str) -> int:
        return main(["fuse", self.name, str(self.out), "--lora", str(self.lora), *options])

    def verify(self) -> int:
        return main(["verify", str(self.out), self.name, "--lora", str(self.lora)])

    def fetched(self, since: int = 0) -> int:
        return sum(call.sent for call in self.hub.log[since:] if call.line.startswith(STORED))


@pytest.fixture
def place(tmp_path: Path, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(arriving_file, "RANGE", 1 << 19)
    yield Place(tmp_path, hub)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_after_a_kill_finished_shards_are_not_fetched_again_and_the_bytes_are_those_of_a_fuse_from_disk(
    place: Place, tmp_path: Path
) -> None:
    place.hub.faults.append(Fault(STORED, times=-1, bytes_per_s=8e6))
    command = [sys.executable, "-m", "lora_fuse", "fuse", place.name, str(place.out), "--lora", str(place.lora)]
    with subprocess.Popen(command, env={**os.environ, "TMPDIR": str(tmp_path / "tmp")}, text=True) as process:
        until(lambda: len(list(tmp_path.glob(".out.partial-*/done/transformer/[!.]*.json"))) > 2, process)
        process.send_signal(signal.SIGKILL)
    finished = len(list(tmp_path.glob(".out.partial-*/done/transformer/[!.]*.json")))
    assert not place.out.exists()
    (left,) = (tmp_path / "tmp").iterdir()
    assert left.stat().st_mode & 0o77 == 0
    os.utime(left, (0, 0))
    place.hub.faults.clear()
    before = len(place.hub.log)
    assert place.fuse() == 0
    rest = place.weights - finished * SHARD
    assert rest - SHARD < place.fetched(before) < rest + merges.SHARDS * streamed_base.FIRST
    lock = lock_base(tiny.on_hub(REPO, place.commit), previous=None)
    plan = lora_fuse.plan(hf_cache.locate(lock), [LoraInput("l", place.lora, 1.0)])
    with pytest.warns(UserWarning, match="no alpha"):
        lora_fuse.fuse(plan, tmp_path / "disk", untouched="copy")
    assert merges.hashes(tmp_path / "disk") == merges.hashes(place.out)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_a_gpu_makes_the_same_bytes_of_what_arrives(place: Place) -> None:
    assert place.fuse("--device", "cuda") == 0
    assert torch.cuda.max_memory_allocated() > SHARD // 2  # of one weight and its sum
    made = merges.hashes(place.out)
    assert place.fuse("--device", "cpu", "--replace") == 0
    assert merges.hashes(place.out) == made


def test_every_byte_is_fetched_once_and_none_is_kept_but_in_a_merge_that_verifies(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with streamed_base.open_streamed(place.name) as base:
        plan = lora_fuse.plan(base, [LoraInput("l", place.lora, 1.0)])
        with pytest.warns(UserWarning, match="no alpha"):
            made = lora_fuse.fuse(plan, place.out).manifest
    assert place.weights <= place.fetched() < place.weights + (merges.SHARDS + 1) * streamed_base.FIRST
    assert not [path for path in (tmp_path / "hf-home").rglob("*") if path.stat().st_size > streamed_base.FIRST]
    assert made.base is not None
    assert (made.base.repo_id, made.base.revision) == (REPO, place.commit)
    assert made.base.files.keys() == made.files.keys()
    before = len(place.hub.log)
    assert place.verify() == 0
    assert "6 targets (6 modules), 96 of 6144 rows, 6 tensors and 6 files identical" in capsys.readouterr().out
    assert place.fetched(before) < 0.9 * place.weights  # half of it is no target, and of the rest some rows are read
    for name, at in (("vae/diffusion_pytorch_model", -1), ("transformer/diffusion_pytorch_model-00002-of-00006", -1)):
        changed = place.out / f"{name}.safetensors"
        content = bytearray(changed.read_bytes())
        content[at] ^= 1
        changed.write_bytes(content)
    assert place.verify() == 1
    assert "FAILED, 2 problems" in capsys.readouterr().out


def test_a_lost_connection_keeps_what_is_finished_and_a_wrong_shard_is_fetched_once_more(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(remote_file, "DELAYS", OFTEN)
    place.hub.faults.append(Fault(place.stored(6), times=-1, skip=2, status=502))
    assert place.fuse() == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "answered 502" in error
    assert "what is finished stays" in error
    assert not place.out.exists()
    finished = len(list(place.root.glob(".out.partial-*/done/transformer/[!.]*.json")))
    assert finished > 0
    place.hub.faults[:] = [Fault(place.stored(6), skip=3, times=1, flip_at=1000)]
    before = len(place.hub.log)
    assert place.fuse() == 0
    assert "fetching transformer/diffusion_pytorch_model-00006-of-00006.safetensors again" in capsys.readouterr().err
    more = place.weights - finished * SHARD + SHARD
    assert more - SHARD < place.fetched(before) < more + merges.SHARDS * streamed_base.FIRST


def test_a_shard_that_is_wrong_twice_is_refused_and_nothing_of_it_is_left(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = place.hub.lfs.path(place.stored(2).removeprefix(STORED))
    content = bytearray(stored.read_bytes())
    content[-1] ^= 1
    stored.write_bytes(content)
    assert place.fuse() == 2
    assert "expected" in (error := capsys.readouterr().err.splitlines()[-1])
    assert "it was fetched twice" in error
    assert not place.out.exists()
    assert merges.left(place.root) == []


def test_what_cannot_be_streamed_is_refused_in_one_line_before_anything_is_fetched(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*words: str, base: str = place.name, more: tuple[str, ...] = ()) -> None:
        assert main(["plan", base, "--lora", str(place.lora), *more]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert [word for word in words if word not in error] == [], error

    refused("is float16", "fetch the base first", more=("--dtype", "float16"))
    refused("write hf://owner/name@commit", base="hf://base")
    place.hub.faults.append(Fault(STORED, times=1, whole=True))
    refused("answered 200, not 206", "fetch the base first")
    shutil.rmtree(place.base)
    place.base = merges.write_coded_base(place.root / "coded")
    index = {"_class_name": "X", "transformer": ["diffusers", "Y"]}
    coded = {f"transformer/{path.relative_to(place.base).as_posix()}": path.read_bytes() for path in place.files}
    place.push({**coded, "model_index.json": json.dumps(index).encode()})
    refused("is quantised", "fetch it first", base=place.name)
    assert place.fetched() < place.weights
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused("HF_HUB_OFFLINE is set", base=place.name)


def test_a_plan_fetches_headers_alone_and_says_what_a_branch_is(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", f"hf://{REPO}", "--lora", str(place.lora)]) == 0
    printed = capsys.readouterr()
    assert f"hf://{REPO}@main is {place.commit} now" in printed.err
    assert "6 of 12 tensors change" in printed.out
    assert place.fetched() <= (merges.SHARDS + 1) * streamed_base.FIRST


def test_a_recipe_streams_its_base_and_what_needs_it_here_says_how_it_is_fetched(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "conf").symlink_to(ROOT / "conf")
    monkeypatch.chdir(project)
    from_hub = [f"base.repo_id={REPO}", f"base.revision={place.commit}", "base.path=null", "download.stream=true"]
    lora = [f"loras.lightning.path={place.lora.parent}", f"loras.lightning.filename={place.lora.name}"]
    recipe = load([*from_hub, *lora])
    assert download(recipe) == 0
    assert "is not fetched (download.stream)" in capsys.readouterr().err
    assert place.fetched() <= (merges.SHARDS + 1) * streamed_base.FIRST
    assert fuse(recipe) == 0
    manifest, _ = read_manifest(HERE.manifest)
    assert manifest.base == HERE.read_locks()[0]
    assert verify(recipe) == 0
    assert json.loads(HERE.verify.read_text())["problems"] == []
    assert place.fetched() < 2 * place.weights
    with (
        pytest.raises(BadSource, match=r"next: python -m stages.download recipe=pocket download.stream=false"),
        next_commands(HERE, recipe),
        paths.held([manifest.base]),
    ):
        pass
