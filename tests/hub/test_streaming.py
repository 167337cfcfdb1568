"""A base fused while it arrives from a Hub: the bytes of a fuse from disk, each fetched once, none of them kept."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import lora_fuse
from lora_fuse.cli import main
from lora_fuse.hub import lock_base, streamed_base
from lora_fuse.hub.streaming import arriving_file
from lora_fuse.lora.inputs import LoraInput
from lora_fuse.recipe import hf_cache
from tests.hub_server import LoopbackHub
from tests.support import merges, tiny

REPO = "alice/base"
STORED = "GET /_lfs/"


class Place:
    """A base of six shards and a VAE on the Hub, and a LoRA for it here."""

    def __init__(self, root: Path, hub: LoopbackHub) -> None:
        self.hub = hub
        self.lora = merges.write_lora(root / "l.safetensors")
        self.out = root / "out"
        rng = np.random.default_rng(1)
        tensors: dict[str, tiny.Array] = {}
        for block in range(merges.SHARDS):
            for name in ("to_q", "to_r"):
                tensors[f"blocks.{block}.{name}.weight"] = rng.standard_normal(merges.LINEAR).astype(tiny.BF16)
        self.base = tiny.write_pipeline(root / "base", tensors, merges.SHARDS)
        content = {path.relative_to(self.base).as_posix(): path.read_bytes() for path in files_of(self.base)}
        self.commit = hub.push(REPO, dict(content)).oid
        self.name = f"hf://{REPO}@{self.commit}"

    def fuse(self, *more: str) -> int:
        return main(["fuse", self.name, str(self.out), "--lora", str(self.lora), *more])

    def fetched(self) -> int:
        return sum(call.sent for call in self.hub.calls(STORED))


def files_of(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


@pytest.fixture
def place(tmp_path: Path, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(arriving_file, "RANGE", 1 << 19)
    yield Place(tmp_path, hub)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_the_bytes_are_those_of_a_fuse_from_disk_and_each_is_fetched_once(place: Place, tmp_path: Path) -> None:
    assert place.fuse() == 0
    weights = sum(path.stat().st_size for path in files_of(place.base) if path.suffix == ".safetensors")
    assert weights <= place.fetched() < weights + 8 * streamed_base.FIRST
    assert not [path for path in Path(tmp_path / "hf-home").rglob("*") if path.stat().st_size > 1 << 16]
    streamed = merges.hashes(place.out)
    shutil.rmtree(place.out)
    lock = lock_base(tiny.on_hub(REPO, place.commit), previous=None)
    plan = lora_fuse.plan(hf_cache.locate(lock), [LoraInput("l", place.lora, 1.0)])
    with pytest.warns(UserWarning, match="no alpha"):
        assert lora_fuse.fuse(plan, tmp_path / "disk", untouched="copy").manifest.base is None
    assert merges.hashes(tmp_path / "disk") == streamed


def test_the_python_door_names_the_base_in_the_manifest(place: Place) -> None:
    with streamed_base.open_streamed(place.name) as base:
        plan = lora_fuse.plan(base, [LoraInput("l", place.lora, 1.0)])
        with pytest.warns(UserWarning, match="no alpha"):
            made = lora_fuse.fuse(plan, place.out).manifest
    assert made.base is not None
    assert (made.base.repo_id, made.base.revision) == (REPO, place.commit)
    assert made.base.files.keys() == made.files.keys()
