"""Laws of a regression on several GPUs: process i has GPU i, and makes what one process makes. Skipped without two."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.machine import python_path
from tests.support.on_gpu import merge

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs here")]

RENDERING = """
import sys
from dataclasses import replace
from pathlib import Path
from lora_fuse.pictures.distributed import DistributedRenderer

team, merged, out = DistributedRenderer("cuda", None), Path(sys.argv[1]), Path(sys.argv[2])
from lora_fuse.pictures.environment import environment, make_deterministic
make_deterministic()
import torch
from lora_fuse.pictures.pairs import render_pairs
from tests.support.on_gpu import CASES, SETUP, plan

cases = [replace(CASES[0], name=f"seed{seed}", seed=seed) for seed in range(3)]
key = str(environment("cuda", "bfloat16").key)
pairs = team.render(cases, key, lambda mine: render_pairs(merged, plan(), mine, SETUP))
(out / f"process{team.here.rank}.txt").write_text(str(torch.cuda.get_device_properties(0).uuid))
for pair in pairs or ():
    for side in ("merged", "unfused", "floor"):
        (out / f"{pair.case.name}.{side}.png").write_bytes(getattr(pair, side).png)
"""


def files(folder: Path, ending: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob(f"*.{ending}")}


def test_process_i_has_gpu_i_and_the_pictures_are_those_of_one_process(tmp_path: Path) -> None:
    merged, script = merge(tmp_path / "merged"), tmp_path / "rendering.py"
    script.write_text(RENDERING)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    outs = {}
    for name, program in (("one", [sys.executable]), ("two", launcher)):
        outs[name] = tmp_path / name
        outs[name].mkdir()
        command = [*program, str(script), str(merged), str(outs[name])]
        subprocess.run(command, env={**os.environ, "PYTHONPATH": python_path()}, check=True)
    uuids = [str(torch.cuda.get_device_properties(gpu).uuid) for gpu in range(2)]
    assert files(outs["two"], "txt") == {f"process{i}.txt": uuid.encode() for i, uuid in enumerate(uuids)}
    assert len(files(outs["one"], "png")) == 9
    assert files(outs["two"], "png") == files(outs["one"], "png")
