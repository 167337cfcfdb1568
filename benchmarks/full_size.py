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
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from benchmarks import make_pipeline
from benchmarks.fuse import DIFFUSERS, machine
from benchmarks.memory_limit import LimitedRun, PeakSampler, limiting, mechanism, memory_of_all, run_limited
from lora_fuse.errors import Refused
from lora_fuse.machine import interrupts, progress, space, staging, text

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
ROWS = "rows.jsonl"
KEPT = frozenset({"base", "lora", "made"})
LORA = "lora/lora.safetensors"
DIFFUSERS_FUSES = "diffusers: load, fuse, save"
DVC = "DVC: hashes, locks"
MD5 = "md5sum of a shard"  # DVC takes so long for each folder of shards at least
REPORT = "report.html"
EVERY = 0.5  # seconds between two looks for a row
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
        run.well(name)
        return cls(name, run.seconds, run.used, run.peak)


def measured(arguments: Sequence[str], rows: str, limit: float | None) -> int:
    """Run Python with these arguments as DVC asked for it, note a stage's row in a file, and give its exit code."""
    stage = arguments[1].removeprefix("stages.") if arguments[:1] == ["-m"] else ""
    how = mechanism() if limit and stage and stage not in UNLIMITED else "none"
    before = os.times()
    begun = time.perf_counter()
    process = subprocess.Popen([*limiting(how, int(limit or 0)), sys.executable, *arguments])
    with PeakSampler(partial(memory_of_all, process.pid)) as sampler:
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
    parser.add_argument("--keep", action="store_true", help="leave the model in --folder, for the next run")
    parser.add_argument("--without-peers", action="store_true", help="no cp, no diffusers")
    options = parser.parse_args()
    need = _bytes_needed(options.blocks, publish=options.publish)
    text.say(f"needs {progress.human_bytes(need)} of the disk of {options.folder}; {machine()}")
    space.require(options.folder, need, "the benchmark", "name another place with --folder, or fewer --blocks")
    with _folder(options.folder, options.blocks, keep=options.keep) as folder:
        table = Table(folder, options.limit)
        if not (folder / "made").exists():
            make = [sys.executable, "-m", "benchmarks.make_pipeline", str(folder), "--blocks", str(options.blocks)]
            table.add(Row.of("make the model", run_limited(make, None, env=_environment(ROOT))))
            os.sync()  # what is written behind would disturb what is measured; here and below
            (folder / "made").touch()
        if not options.without_peers:
            table.add(_peer(folder, "cp of the transformer", ["cp", "-r", "--reflink=never"], []))
            shard = max((folder / "base/transformer").iterdir(), key=lambda path: path.stat().st_size)
            table.add(Row.of(MD5, run_limited(["md5sum", str(shard)], None)))
        project = Project(folder, options.limit, table, publishes=options.publish)
        project.build()
        if options.publish:
            project.publish()
        if not options.without_peers:
            if _has_gpu():
                _pictures(project.root, table)
            shutil.rmtree(project.root)  # there may be no room for another merge
            table.add(_peer(folder, DIFFUSERS_FUSES, [sys.executable, "-c", DIFFUSERS], [LORA]))


@contextmanager
def _folder(parent: Path, blocks: int, *, keep: bool) -> Iterator[Path]:
    """A folder that is removed afterwards; or one of this size, of which the model is kept."""
    if not keep:
        with tempfile.TemporaryDirectory(dir=parent) as temporary:
            yield Path(temporary)
        return
    folder = parent / f"full-size-{blocks}"
    if not (folder / "made").exists():
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        for path in folder.iterdir():
            if path.name not in KEPT:
                staging.remove(path)


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


def _peer(folder: Path, name: str, command: list[str], more: list[str]) -> Row:
    """Time a peer that makes a folder of the transformer, and remove it: `more` files are between the two."""
    out = folder / "out"
    files = [folder / "base/transformer", *(folder / one for one in more), out]
    return Row.of(name, run_limited([*command, *map(str, files)], None).well(name).without(out))


def _rendering(project: Path, whole: float) -> Iterator[Row]:
    """Parts of the seconds of `regress` by its own record, the rest of them, a picture of each side; and its report."""
    run = json.loads((project / "artifacts/regression/run.json").read_text(encoding="utf-8"))
    seconds = run["seconds"]
    for name, took in seconds["loads"].items():
        yield Row(f"regress: {name}", took, 0.0, 0)
    of_sides = {side: [*seconds[side].values()] for side in ("merged", "unfused", "floor")}
    pictures = sum(map(sum, of_sides.values()))
    yield Row("regress: all pictures", pictures, 0.0, 0)
    yield Row("regress: the rest, with its end", whole - pictures - sum(seconds["loads"].values()), 0.0, 0)
    for side, each in of_sides.items():
        yield Row(f"regress: a picture, {side}", statistics.median(each), 0.0, 0)
    yield Row(REPORT, 0.0, 0.0, 0)


def _pictures(project: Path, table: Table) -> None:
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
    for name, each in of.items():
        table.add(Row(labels[name], statistics.median(each), 0.0, 0))


class Table:
    """The table in Markdown, a line as soon as its step is done."""

    def __init__(self, folder: Path, limit: float | None) -> None:
        self._folder = folder
        self._copied: float | None = None
        how = f", limit {progress.human_bytes(int(limit))} by {mechanism()}" if limit else ""
        text.say(f"{machine()}{how}")
        text.say("")
        text.say("| step | seconds | of one core | bytes | GB/s | times cp | memory of its own |")
        text.say("|---|---|---|---|---|---|---|")

    def add(self, row: Row) -> None:
        """Print a row."""
        if row.name.startswith("cp "):
            self._copied = row.seconds
        size = self._size(row.name)
        read = progress.human_bytes(size) if size else ""
        rate = f"{size / 1e9 / row.seconds:.2f}" if size and row.seconds else ""
        times = f"{row.seconds / self._copied:.2f}" if self._copied and row.name in ("fuse", DIFFUSERS_FUSES) else ""
        peak = f"{row.peak / 1e9:.2f} GB" if row.peak else ""
        used = f"{row.used:.1f}" if row.used else ""
        seconds = f"{row.seconds:.1f}" if row.seconds else ""
        text.say(f"| {' | '.join([row.name, seconds, used, read, rate, times, peak])} |")

    @contextmanager
    def following(self, file: Path) -> Iterator[list[Row]]:
        """Print the rows that stages write to a file meanwhile; at the end, all are in the list that is yielded."""
        rows: list[Row] = []
        stop = threading.Event()

        def look() -> None:
            while not stop.wait(EVERY):
                take()

        def take() -> None:
            written = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
            for line in written[len(rows) :]:
                rows.append(Row(**json.loads(line)))
                self.add(rows[-1])

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield rows
        finally:
            stop.set()
            thread.join()
            take()
            file.unlink(missing_ok=True)

    def _size(self, step: str) -> int:
        """Bytes that a step reads or writes."""
        parts = {
            "make the model": ["base"],
            "cp of the transformer": ["base/transformer"],
            DIFFUSERS_FUSES: ["base/transformer"],
            "download": ["base", "lora"],
            "fuse": ["base/transformer"],
            "verify": ["base"],
            DVC: ["base"],
            "export": ["project/artifacts/export"],
            "publish": ["base", "base/transformer"],
            REPORT: ["project/artifacts/regression/report.html"],
        }
        return sum(_size(self._folder / part) for part in parts.get(step, []))


class Project:
    """A copy of this checkout beside the model, in which the recipe is built."""

    def __init__(self, folder: Path, limit: float | None, table: Table, *, publishes: bool) -> None:
        self.root = folder / "project"
        self._table = table
        self._rows = folder / ROWS
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
        self._configure(publishes=publishes)
        self._start()

    def build(self) -> None:
        """Build to the verdict; a row for each stage and what regress says of itself, one for DVC, one for all.

        Raises:
            Refused: a stage failed, by more than that nobody has approved its pictures.
        """
        stages = self._built("all, to the verdict", ["dvc", "repro"])
        for row in _rendering(self.root, next(row.seconds for row in stages if row.name == "regress")):
            self._table.add(row)

    def publish(self) -> None:
        """Approve the pictures, export, and publish to a Hub on the loopback; needs DVC and git.

        Raises:
            Refused: a stage failed.
        """
        with _hub(self.root.parent) as variables:
            os.environ.update(variables)
            self._run([sys.executable, "-m", "stages.approve", "--reason", "made by the benchmark"])
            self._commit()
            self._built("approved and exported", ["dvc", "repro"])
            self._built("published", ["dvc", "repro", "publish/dvc.yaml"])

    def _built(self, name: str, command: list[str]) -> list[Row]:
        """Run a command that builds, and return the rows of its stages."""
        has_dvc = find_spec("dvc") is not None
        with self._table.following(self._rows) as rows:
            run = self._run(command) if has_dvc else self._run_stages()
        if has_dvc:
            rest = run.seconds - sum(row.seconds for row in rows)
            self._table.add(Row(DVC, rest, run.used - sum(row.used for row in rows), 0))
        self._table.add(Row(name, run.seconds, run.used, max(row.peak for row in rows)))
        return rows

    def _run_stages(self) -> LimitedRun:
        """Run all stages of dvc.yaml, where there is no DVC."""
        stages = yaml.safe_load((self.root / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
        order = ["download", "fuse", "goldens", "verify", "export", "regress", "gate"]
        return self._run(["sh", "-c", " && ".join(stages[name]["cmd"] for name in order)])

    def _run(self, command: list[str]) -> LimitedRun:
        run = run_limited(command, None, cwd=self.root, env=_environment(self.root, self._programs))
        verdict = "exited with 3" in run.output or "exited with 4" in run.output or run.code in GATE_CODES
        if not verdict:
            raise Refused(f"{' '.join(command)} ended with {run.code}: {run.output[-3000:]}")
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

    def _configure(self, *, publishes: bool) -> None:
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
        recipe["publish"] = {"enabled": True, "repo_id": "alice/full-size", "license": "apache-2.0"}
        recipe["export"] = {"formats": ["single_file"] if publishes else []}
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


def _size(place: Path) -> int:
    files = [path for path in place.rglob("*") if path.is_file()] if place.is_dir() else [place]
    return sum(path.stat().st_size for path in files if path.exists())


if __name__ == "__main__":
    sys.exit(interrupts.guarded(main))
