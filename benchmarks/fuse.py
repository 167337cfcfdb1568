"""Time the fuse against its peers on weights of real shapes: ``python -m benchmarks.fuse [--blocks 8] [--runs 3]``.

Every run is a process of its own; the three take turns, so that a slow moment of the machine hits all of them. The
files are in the page cache as far as memory allows. `cp` copies the same files: nothing that reads and writes them can
be faster. diffusers loads the base, loads and fuses the LoRA and saves. The engine hashes what it writes, the others
do not. The stage also knows that base and LoRA are what was locked: by the states that `stages.download` noted, by
hashing them first where it noted none, or by hashing what is read.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.memory_limit import LimitedRun, run_limited
from lora_fuse.machine import interrupts

ROOT = Path(__file__).resolve().parents[1]
STAGES = {
    "stage, inputs: stat": "python -m stages.fuse {given}",
    "stage, nothing noted": "rm artifacts/sources.seen.json && python -m stages.fuse {given}",
    "stage, inputs: hash": "python -m stages.fuse {given} fuse.inputs=hash",
}

DIFFUSERS = """
import sys, torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
base, lora, out = sys.argv[1:]
model = QwenImageTransformer2DModel.from_pretrained(base, torch_dtype=torch.bfloat16)
model.load_lora_adapter(QwenImagePipeline.lora_state_dict(lora), prefix="transformer")
model.fuse_lora(lora_scale=1.0)
model.unload_lora()
model.save_pretrained(out, max_shard_size="5GB")
"""


def measure(command: Sequence[str], out: Path, cwd: Path = ROOT) -> LimitedRun:
    """Run a command that writes `out`, in a folder, and remove what it wrote.

    Raises:
        Refused: it failed.
    """
    whole = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return run_limited(command, None, cwd=cwd, env=whole).well(" ".join(command)).without(out)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the checkpoint, take turns, print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuse", description="time the fuse against its peers")
    parser.add_argument("--blocks", type=int, default=8, help="transformer blocks of 60 (default: 8, 5.5 GB)")
    parser.add_argument("--runs", type=int, default=3, help="runs of each; the median counts (default: 3)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="of the engine")
    parser.add_argument("--folder", type=Path, help="for the files, three times their size; default: a temporary one")
    parser.add_argument("--without-diffusers", action="store_true", help="it holds the whole model in memory")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        # In a process of its own: what this one holds would count as the peak of every process that it starts.
        make = [sys.executable, "-m", "benchmarks.make_checkpoint", str(folder), "--blocks", str(options.blocks)]
        subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
        base = folder / "transformer"
        lora = folder / "lora.safetensors"
        out = folder / "out"
        fuse = [sys.executable, "-m", "lora_fuse", "fuse", str(base), str(out), "--lora", str(lora), "--scale", "1.0"]
        commands = {
            "cp": ["cp", "-r", "--reflink=never", str(base), str(out)],
            "diffusers": [sys.executable, "-c", DIFFUSERS, str(base), str(lora), str(out)],
            "lora-fuse": [*fuse, "--device", options.device],
        }
        if options.without_diffusers:
            del commands["diffusers"]
        places = dict.fromkeys(commands, (out, ROOT))
        project = folder / "project"
        given = _project(project, base, lora)
        commands |= {name: ["sh", "-c", command.format(given=given)] for name, command in STAGES.items()}
        places |= dict.fromkeys(STAGES, (project / "artifacts/merged", project))
        size = sum(path.stat().st_size for path in base.iterdir())
        print(f"{options.blocks} of 60 blocks, {size / 1e9:.2f} GB, bfloat16, rank 64; {machine()}")
        runs: dict[str, list[LimitedRun]] = {name: [] for name in commands}
        for _ in range(options.runs):
            for name, command in commands.items():
                runs[name].append(measure(command, *places[name]))
        _table(runs, size)


def _project(project: Path, base: Path, lora: Path) -> str:
    """Make a folder in which the stages find the base as a pipeline, lock it, and give the overrides for it."""
    (project / "base/scheduler").mkdir(parents=True)
    (project / "conf").symlink_to(ROOT / "conf")
    (project / "base/transformer").symlink_to(base)
    parts = {"scheduler": "FlowMatchEulerDiscreteScheduler", "transformer": "QwenImageTransformer2DModel"}
    index = {"_class_name": "QwenImagePipeline", **{name: ["diffusers", kind] for name, kind in parts.items()}}
    (project / "base/model_index.json").write_text(json.dumps(index))
    (project / "base/scheduler/scheduler_config.json").write_text(json.dumps({"_class_name": parts["scheduler"]}))
    names = (lora.parent, lora.name)
    given = "base.path=base loras.lightning.path={} loras.lightning.filename={}".format(*names)
    measure(["sh", "-c", f"mkdir gone && python -m stages.download {given}"], project / "gone", project)
    return given


def _table(runs: dict[str, list[LimitedRun]], size: int) -> None:
    medians = {name: statistics.median(run.seconds for run in of_name) for name, of_name in runs.items()}
    width = max(map(len, runs))
    print(f"| {'':{width}} | seconds, each run | median | of one core | GB/s | times cp | peak memory |")
    print(f"|{'-' * (width + 2)}|---|---|---|---|---|---|")
    for name, of_name in runs.items():
        each = ", ".join(f"{run.seconds:.1f}" for run in of_name)
        ratio = medians[name] / medians["cp"]
        peak = max(run.resident for run in of_name) / 1e9
        used = statistics.median(run.used for run in of_name)
        speed = size / 1e9 / medians[name]
        figures = f"{medians[name]:.1f} | {used:.1f} | {speed:.2f} | {ratio:.2f} | {peak:.2f} GB"
        print(f"| {name:{width}} | {each} | {figures} |")
    if "diffusers" in medians:
        print(f"lora-fuse is {medians['diffusers'] / medians['lora-fuse']:.1f} times as fast as diffusers")


def machine() -> str:
    """Name this machine by its cores."""
    about = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", about.read_text(encoding="utf-8") if about.exists() else "")
    return f"{os.cpu_count()} cores ({model[1] if model else platform.machine()})"


if __name__ == "__main__":
    sys.exit(interrupts.guarded(main))
