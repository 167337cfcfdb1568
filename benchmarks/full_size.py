"""Time the whole pipeline from base to verdict at its real size: ``python -m benchmarks.full_size``, on a GPU host.

It makes a Qwen-Image-Edit of 57.7 GB with random weights (`benchmarks.make_pipeline`) and a LoRA, and builds the recipe
in a copy of this checkout by a real `dvc repro`. Every stage's process is measured from outside: seconds, seconds of
one core, and the most memory that it held of its own, which the page cache is not. What `dvc repro` takes beyond its
stages is DVC's: it hashes what comes out. In the same run: `cp` of the transformer, and diffusers' load, fuse and save.
On a GPU also one picture by diffusers as it comes, with 4 steps and with 50.

``--blocks 8`` is for every machine: a small text encoder, and on a CPU one small picture. ``--limit 2e9`` puts all
stages but the one that renders under a limit of memory, ``--publish`` exports a single file and publishes it to a Hub
on the loopback, as the recipe's next steps. Without DVC the stages run one after another, as dvc.yaml has them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from benchmarks import make_pipeline
from benchmarks.fuse import DIFFUSERS, machine
from benchmarks.memory_limit import LimitedRun, PeakSampler, limiting, mechanism, run_limited
from lora_fuse.errors import Refused
from lora_fuse.machine import interrupts, progress, space, text

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("lora_fuse", "stages", "conf", "inputs", "pocket", "publish", "variants", ".dvc")
FILES = ("dvc.yaml", "params.yaml", "pyproject.toml", "constraints.txt", ".gitignore", ".dvcignore")
DEFAULTS: list[Any] = [{"/base": "qwen_image_edit"}, {"/scheduler": "lightning"}, {"/sampling": "lightning_4steps"}]
RECIPE: dict[str, Any] = {
    "name": "full_size",
    "base": {"path": "base", "repo_id": None, "revision": None},
    "loras": {"made": {"path": "lora", "repo_id": None, "revision": None, "filename": "lora.safetensors"}},
}
SIDE = 64  # pixels of the one picture on a CPU
UNLIMITED = frozenset({"regress"})  # it holds a model, on a GPU or not
GATE_CODES = frozenset({0, 3, 4})  # passed, and what has no golden yet on this kind of machine
FIXED = 5e9  # bytes of what is not the transformer, for fewer blocks than all
ALL = 57.7e9  # bytes of the whole pipeline
BLOCK = 680e6  # bytes of one block

PICTURES = """
import sys, time
import torch
from diffusers import QwenImageEditPipeline
from PIL import Image
begun = time.perf_counter()
pipe = QwenImageEditPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.bfloat16, device_map="cuda")
pipe.set_progress_bar_config(disable=True)
torch.cuda.synchronize()
print(f"load {time.perf_counter() - begun:.2f}")
image = Image.open(sys.argv[2]).convert("RGB").resize((1024, 1024))
for name, steps, scale in [("warm", 4, 1.0)] + 5 * [("4", 4, 1.0)] + [("50", 50, 4.0)]:
    begun = time.perf_counter()
    pipe(image=image, prompt="Change the rabbit's color to purple", negative_prompt=" ", num_inference_steps=steps,
         true_cfg_scale=scale, height=1024, width=1024, generator=torch.Generator().manual_seed(0))
    torch.cuda.synchronize()
    print(f"{name} {time.perf_counter() - begun:.2f}")
"""

# Stands before Python on the PATH of `dvc repro`, and notes what each stage takes.
MEASURED = """#!{python}
import sys
sys.path.insert(0, {root!r})
from benchmarks.full_size import measured
sys.exit(measured(sys.argv[1:], {rows!r}, {limit!r}))
"""


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table: seconds of wall time and of one core, bytes held of its own at most."""

    name: str
    seconds: float
    used: float
    peak: int

    @classmethod
    def of(cls, name: str, run: LimitedRun) -> Row:
        """Measure a command that ran.

        Raises:
            Refused: it failed.
        """
        if run.code:
            raise Refused(f"{name} ended with {run.code}: {run.output[-2000:]}")
        return cls(name, run.seconds, run.used, run.peak)


def measured(arguments: Sequence[str], rows: str, limit: float | None) -> int:
    """Run Python with these arguments as DVC asked for it, note a stage's row in a file, and give its exit code."""
    stage = arguments[1].removeprefix("stages.") if arguments[:1] == ["-m"] else ""
    how = mechanism() if limit and stage and stage not in UNLIMITED else "none"
    before = os.times()
    begun = time.perf_counter()
    process = subprocess.Popen([*limiting(how, int(limit or 0)), sys.executable, *arguments])
    with PeakSampler(process.pid) as sampler:
        process.wait()
    seconds = time.perf_counter() - begun
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    if stage:
        with Path(rows).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(Row(stage, seconds, used, sampler.peak))) + "\n")
    return process.returncode


def main() -> None:
    """Make the model, run everything, print the table, remove the files."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.full_size", description="from base to verdict, timed")
    parser.add_argument("--blocks", type=int, default=make_pipeline.BLOCKS, help="transformer blocks (default: 60)")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="for the files")
    parser.add_argument("--limit", type=float, help="bytes of memory for every stage but the one that renders, as 2e9")
    parser.add_argument("--publish", action="store_true", help="also export a single file, and publish on the loopback")
    parser.add_argument("--without-peers", action="store_true", help="no cp, no diffusers")
    options = parser.parse_args()
    need = _bytes_needed(options.blocks, publish=options.publish)
    text.say(f"needs {progress.human_bytes(need)} of the disk of {options.folder}; {machine()}")
    space.require(options.folder, need, "the benchmark", "name another place with --folder, or fewer --blocks")
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        make = [sys.executable, "-m", "benchmarks.make_pipeline", str(folder), "--blocks", str(options.blocks)]
        rows = [Row.of("make the model", run_limited(make, None, env=_environment(ROOT)))]
        if not options.without_peers:
            rows += _peers(folder)
        project = Project(folder, options.limit, publishes=options.publish)
        rows += project.build()
        rows += _rendering(project.root)
        sizes = _sizes(folder, project.root)
        if not options.without_peers and _has_gpu():
            rows += _pictures(project.root)
        _print(rows, sizes, options)


def _bytes_needed(blocks: int, *, publish: bool) -> int:
    """Bytes of disk: base, merge (which links what does not change), the LoRA; a single file, and the Hub's copy."""
    transformer = blocks * BLOCK
    base = ALL if blocks == make_pipeline.BLOCKS else transformer + FIXED
    return int(base + 1.1 * transformer + (2 * transformer + base if publish else 0))


def _has_gpu() -> bool:
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _environment(root: Path, first: Path | None = None) -> dict[str, str]:
    """The variables of a command: the code in `root` counts, and programs of `first` come before all others."""
    programs = [str(folder) for folder in (first, Path(sys.executable).parent) if folder]
    code = [str(root), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    path = os.pathsep.join([*programs, os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join(code)}


def _peers(folder: Path) -> list[Row]:
    """Time `cp` of the transformer, and diffusers' load, fuse and save, on the CPU."""
    base = folder / "base/transformer"
    out = folder / "out"
    lora = folder / "lora/lora.safetensors"
    commands = {
        "cp of the transformer": ["cp", "-r", "--reflink=never", str(base), str(out)],
        "diffusers: load, fuse, save": [sys.executable, "-c", DIFFUSERS, str(base), str(lora), str(out)],
    }
    rows = []
    for name, command in commands.items():
        rows.append(Row.of(name, run_limited(command, None)))
        shutil.rmtree(out)
        os.sync()  # what it wrote must not be written back during the next one
    return rows


def _rendering(project: Path) -> list[Row]:
    """Seconds of what `regress` loads and of a picture, as its own record has them: parts of its row."""
    run = json.loads((project / "artifacts/regression/run.json").read_text(encoding="utf-8"))
    seconds = run["seconds"]
    rows = [Row(f"regress: {name}", took, 0.0, 0) for name, took in seconds["loads"].items()]
    for side in ("merged", "unfused", "floor"):
        took = statistics.median(seconds[side].values())
        rows.append(Row(f"regress: a picture, {side}", took, 0.0, 0))
    return rows


def _pictures(project: Path) -> list[Row]:
    """Time pictures of 1024 x 1024 by diffusers as it comes: the median of five with 4 steps, one with 50 and CFG."""
    merged = project / "artifacts/merged"
    command = [sys.executable, "-c", PICTURES, str(merged), str(project / "pocket/inputs/chelsea.png")]
    run = run_limited(command, None)
    Row.of("diffusers: pictures", run)
    of: dict[str, list[float]] = {}
    for line in run.output.splitlines():
        name, _, seconds = line.partition(" ")
        if name in ("load", "4", "50"):
            of.setdefault(name, []).append(float(seconds))
    labels = {"load": "diffusers: load", "4": "diffusers: a picture, 4 steps", "50": "diffusers: 50 steps, CFG 4"}
    return [Row(labels[name], sorted(each)[len(each) // 2], 0.0, 0) for name, each in of.items()]


class Project:
    """A copy of this checkout beside the model, in which the recipe is built."""

    def __init__(self, folder: Path, limit: float | None, *, publishes: bool) -> None:
        self.root = folder / "project"
        self._publishes = publishes
        self._rows = folder / "rows.jsonl"
        self._programs = folder / "programs"
        for name in (*PARTS, *FILES):
            _copy(ROOT / name, self.root / name)
        (self.root / "artifacts/golden").mkdir(parents=True)
        for name in ("base", "lora"):
            (self.root / name).symlink_to(folder / name)
        self._programs.mkdir()
        program = self._programs / "python"
        program.write_text(
            MEASURED.format(python=sys.executable, root=str(ROOT), rows=str(self._rows), limit=limit), encoding="utf-8"
        )
        program.chmod(0o755)
        self._configure()
        self._start()

    def build(self) -> list[Row]:
        """Build to the verdict; a row for each stage, one for DVC, one for all.

        Raises:
            Refused: a stage failed, by more than that nobody has approved its pictures.
        """
        rows = self._built("all, to the verdict", ["dvc", "repro"])
        if self._publishes:
            with _hub(self.root.parent) as variables:
                os.environ.update(variables)
                self._run([sys.executable, "-m", "stages.approve", "--reason", "made by the benchmark"])
                self._commit()
                self._rows.unlink()
                rows += [row for row in self._built("", ["dvc", "repro"]) if row.name == "export"]
                self._rows.unlink()
                rows += self._built("publishing", ["dvc", "repro", "publish/dvc.yaml"])
        return rows

    def _built(self, name: str, command: list[str]) -> list[Row]:
        run = self._run(command) if find_spec("dvc") else self._run_stages()
        of_stages = [Row(**json.loads(line)) for line in self._rows.read_text(encoding="utf-8").splitlines()]
        rest = run.seconds - sum(row.seconds for row in of_stages)
        dvc = Row("DVC: hashes, locks", rest, run.used - sum(row.used for row in of_stages), 0)
        whole = Row(name, run.seconds, run.used, max(row.peak for row in of_stages))
        return [*of_stages, *([dvc] if find_spec("dvc") else []), whole]

    def _run_stages(self) -> LimitedRun:
        """Run all stages of dvc.yaml, where there is no DVC."""
        stages = yaml.safe_load((self.root / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
        order = ["download", "fuse", "goldens", "verify", "regress", "export", "gate"]
        commands = " && ".join(stages[name]["cmd"] for name in order)
        return self._run(["sh", "-c", commands])

    def _run(self, command: list[str]) -> LimitedRun:
        run = run_limited(command, None, cwd=self.root, env=_environment(self.root, self._programs))
        verdict = "exited with 3" in run.output or "exited with 4" in run.output or run.code in GATE_CODES
        if not verdict:
            raise Refused(f"{' '.join(command)} ended with {run.code}: {run.output[-3000:]}")
        for line in run.output.splitlines():
            if line.startswith(("regress:", "verify:", "fuse:", "download:", "gate:", "error:")):
                text.say(line)
        return run

    def _start(self) -> None:
        """Make it a repository of git where there is one; and let numba compile what it keeps for the next time."""
        if shutil.which("git"):
            subprocess.run(["git", "init", "-q"], cwd=self.root, check=True)
            self._commit()
        else:
            with (self.root / ".dvc/config").open("a", encoding="utf-8") as file:
                file.write("[core]\n    no_scm = true\n")
        lora = "pocket/lora/pocket-pastel.safetensors"
        warm = [sys.executable, "-m", "lora_fuse", "fuse", "pocket/model", "../warm", "--lora", lora]
        subprocess.run(warm, cwd=self.root, env=_environment(self.root), check=True, stdout=subprocess.DEVNULL)

    def _commit(self) -> None:
        for command in (["add", "-A"], ["commit", "-qm", "benchmark"]):
            who = ["-c", "user.name=benchmark", "-c", "user.email=benchmark@example.org"]
            subprocess.run(["git", *who, *command], cwd=self.root, check=True, stdout=subprocess.DEVNULL)

    def _configure(self) -> None:
        """Write the recipe, as a user has one, and compile it."""
        conf = self.root / "conf"
        on_gpu = _has_gpu()
        recipe = dict(RECIPE)
        recipe["defaults"] = [*DEFAULTS, {"/regress": "edit" if on_gpu else "small"}, "_self_"]
        if not on_gpu:
            edit = yaml.safe_load((conf / "regress/_edit_cases.yaml").read_text(encoding="utf-8"))
            rabbit = edit["cases"]["rabbit"] | {"height": SIDE, "width": SIDE}
            small = {"placement": "cpu", "dtype": "float32", "cases": {"rabbit": rabbit}}
            _write_yaml(conf / "regress/small.yaml", {"defaults": ["_bfloat16", "_self_"], **small})
            recipe["base"] = RECIPE["base"] | {"condition_area": SIDE**2}
        if self._publishes:
            recipe["publish"] = {"enabled": True, "repo_id": "alice/full-size", "license": "apache-2.0"}
            recipe["export"] = {"formats": ["single_file"]}
        _write_yaml(conf / f"recipe/{recipe['name']}.yaml", recipe, "# @package _global_\n")
        command = [sys.executable, "-m", "stages.config", f"recipe={recipe['name']}"]
        subprocess.run(command, cwd=self.root, env=_environment(self.root), check=True, stdout=subprocess.DEVNULL)


def _write_yaml(path: Path, content: dict[str, Any], first: str = "") -> None:
    path.write_text(first + yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "cache", "tmp"))
    else:
        shutil.copy(source, target)


@contextmanager
def _hub(folder: Path) -> Iterator[dict[str, str]]:
    """A Hub on the loopback, and the variables by which a stage finds it."""
    from tests.hub_server import LoopbackHub

    with LoopbackHub(folder / "hub").run() as hub:
        yield {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_TOKEN": "hf_write"}


def _sizes(folder: Path, project: Path) -> dict[str, int]:
    """Bytes that a step reads or writes, by its name in the table."""
    base = _size(folder / "base")
    transformer = _size(folder / "base/transformer")
    lora = _size(folder / "lora")
    steps = {"make the model": base, "cp of the transformer": transformer, "diffusers: load, fuse, save": transformer}
    steps |= {"download": base + lora, "fuse": transformer, "verify": base, "DVC: hashes, locks": base}
    steps["report"] = (project / "artifacts/regression/report.html").stat().st_size
    return steps | {"export": _size(project / "artifacts/export"), "publish": base + transformer}


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _print(rows: list[Row], sizes: dict[str, int], options: argparse.Namespace) -> None:
    limit = f", limit {progress.human_bytes(int(options.limit))} by {mechanism()}" if options.limit else ""
    base = progress.human_bytes(sizes["make the model"])
    text.say(f"{options.blocks} of {make_pipeline.BLOCKS} blocks, {base}{limit}; {machine()}")
    copied = next((row.seconds for row in rows if row.name.startswith("cp")), None)
    report = progress.human_bytes(sizes["report"])
    text.say(f"report.html: {report}")
    text.say("| step | seconds | of one core | GB | GB/s | times cp | memory of its own |")
    text.say("|---|---|---|---|---|---|---|")
    for row in rows:
        size = sizes.get(row.name, 0) / 1e9
        rate = [f"{size:.1f}", f"{size / row.seconds:.2f}"] if size > 0.05 else ["", ""]
        times = f"{row.seconds / copied:.2f}" if copied and row.name in ("fuse", "diffusers: load, fuse, save") else ""
        peak = f"{row.peak / 1e9:.2f} GB" if row.peak else ""
        used = f"{row.used:.1f}" if row.used else ""
        text.say(f"| {' | '.join([row.name, f'{row.seconds:.1f}', used, *rate, times, peak])} |")


if __name__ == "__main__":
    sys.exit(interrupts.guarded(main))
