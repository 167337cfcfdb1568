"""The house's rule: imports run one way, and each heavy library has one importer."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny

ROOT = Path(__file__).resolve().parents[1]

# Lower may not import higher; a module not named here belongs to the middle.
BOTTOM = {"errors", "records", "launched"}
PURE = {
    "allowlist",
    "header",
    "formats",
    "adapter_config",
    "lora",
    "matching",
    "selection",
    "exact",
    "deltas",
    "compiled",
    "lowrank",
    "rounding",
    "fusion",
    "scratch",
}
PURE |= {
    "families",
    "licences",
    "card",
    "statement",
    "bom",
    "block_plot",
    "blocks",
    "regression.metrics",
    "regression.verdicts",
    "regression.report",
    "validation.effect",
    *(f"sweeping.{name}" for name in ("curves", "measures", "numbers", "recommendation", "sheet")),
}
TOP = {"cli", "__main__", "catalog.gather", "catalog.page", "doctor.pictures", "doctor.examination"}
# What stages share; every other module of theirs is a stage.
SHARED = {
    "artifacts",
    "building",
    "compose",
    "config",
    "console",
    "judging",
    "params",
    "planning",
    "points",
    "releasing",
    "swept",
}
SHARED |= {"validating", "variants", "versions"}
# Within `lora_fuse.hub`, from the bottom up: none imports what comes after it.
HUB = ["client", "failures", "leftovers", "room", "child", "process", "transfer", "repository", "locks", "sizes"]

OWNERS = {
    "diffusers": {"lora_fuse/regression/render.py", "lora_fuse/regression/placement.py"},
    "accelerate": {"lora_fuse/regression/placement.py", "lora_fuse/regression/spread.py"},
    "transformers": {"lora_fuse/regression/render.py"},
    "peft": {"lora_fuse/regression/render.py"},
    "huggingface_hub": {
        *(f"lora_fuse/hub/{name}.py" for name in ("client", "failures", "child", "repository")),
        *(f"lora_fuse/publishing/{name}.py" for name in ("sender", "waiting", "remote")),
        "lora_fuse/card.py",
    },
    "cyclonedx": {"lora_fuse/bom.py"},
    "model_signing": {"lora_fuse/signing.py"},
    "safetensors": {"lora_fuse/expected.py"},
    "numba": {"lora_fuse/compiled.py"},
    "hydra": {"stages/compose.py"},
    "omegaconf": {"stages/compose.py"},
}


def modules(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*.py") if path.name != "__init__.py")


def dotted(path: Path) -> str:
    """`regression.render` of `lora_fuse/regression/render.py`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts[1:])


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def within(package: str, path: Path) -> bool:
    """The fuse knows nothing of the pictures; what judges versions by them, and the command line, may."""
    return dotted(path).startswith((f"{package}.", "validation.")) or level(dotted(path)) == level("cli")


def level(module: str) -> int:
    return 0 if module in BOTTOM else 1 if module in PURE else 3 if module in TOP else 2


@pytest.mark.parametrize("path", modules("lora_fuse"), ids=dotted)
def test_the_library_imports_downwards_only(path: Path) -> None:
    siblings = {dotted(other) for other in modules("lora_fuse")}
    for name in imported(path):
        assert not name.startswith(("stages", "pocket", "inputs")), name
        target = name.removeprefix("lora_fuse.")
        if name.startswith("lora_fuse.") and target in siblings:
            assert level(target) <= level(dotted(path)), f"{dotted(path)} imports {name}"
            pictures = within("regression", path) or within("sweeping", path)
            assert pictures or not target.startswith("regression."), f"{dotted(path)} imports {name}"
            assert within("sweeping", path) or not target.startswith("sweeping."), f"{dotted(path)} imports {name}"


@pytest.mark.parametrize("name", HUB)
def test_the_hub_s_modules_import_one_way(name: str) -> None:
    assert {path.stem for path in modules("lora_fuse/hub")} == set(HUB)
    later = {f"lora_fuse.hub.{other}" for other in HUB[HUB.index(name) :]} | {"lora_fuse.hub"}
    assert not imported(ROOT / f"lora_fuse/hub/{name}.py") & (later | {"lora_fuse.hub.child"})


@pytest.mark.parametrize(
    "path", [*modules("lora_fuse"), *modules("stages")], ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_each_heavy_library_has_one_importer(path: Path) -> None:
    here = path.relative_to(ROOT).as_posix()
    for name in imported(path):
        owners = OWNERS.get(name.split(".")[0])
        assert owners is None or here in owners, f"{here} imports {name}"


@pytest.mark.parametrize("path", modules("stages"), ids=lambda path: path.name)
def test_a_stage_is_thin(path: Path) -> None:
    if path.stem not in SHARED:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 60


@pytest.mark.parametrize("module", ["lora_fuse.cli", "stages.config", "stages.gate", "stages.summary", "lora_fuse.hub"])
def test_start_up_imports_nothing_heavy(module: str) -> None:
    heavy = "{'torch', 'diffusers', 'transformers', 'huggingface_hub', 'hydra', 'omegaconf', 'numpy'}"
    code = f"import sys, {module}; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_plain_fuse_on_a_cpu_does_without_torch(tmp_path: Path) -> None:
    """Its import takes seconds."""
    tiny.write_component(tmp_path / "base", tiny.weights())
    tiny.write_lora(tmp_path / "l.safetensors", tiny.lora_tensors("diffusers"))
    code = "import sys; from lora_fuse.cli import main; code = main(sys.argv[1:]); print(code, 'torch' in sys.modules)"
    arguments = ["fuse", tmp_path / "base", tmp_path / "out", "--lora", tmp_path / "l.safetensors", "--scale", "1.0"]
    command = [sys.executable, "-c", code, *map(str, arguments), "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 False"
