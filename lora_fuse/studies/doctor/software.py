"""Versions against the project's ranges, commands on PATH, and the environment that pictures depend on."""

from __future__ import annotations

import platform
import shutil
import tomllib
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from lora_fuse.pictures import environment
from lora_fuse.studies.doctor.finding import Finding, fail, ok, warn

SHOWN = ("torch", "diffusers", "transformers", "huggingface_hub", "dvc")
INSTALL = "make setup, or pip install -c constraints.txt -e '.[pipeline]'"
EXTRAS = ("torch", "hub", "pipeline")  # of the package, that the stages need
# What torch's deterministic mode accepts (docs.pytorch.org, torch.use_deterministic_algorithms).
WORKSPACES = (":4096:8", ":16:8")


def requirements(pyproject: Path) -> tuple[str, list[str]]:
    """The range of Python versions and the stages' requirements: of a checkout, else of the installed package."""
    if pyproject.is_file():
        project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
        extras = [line for extra in EXTRAS for line in project["optional-dependencies"][extra]]
        return project["requires-python"], [*project["dependencies"], *extras]
    markers = {f'extra == "{extra}"' for extra in EXTRAS} | {""}
    pairs = [line.partition("; ") for line in requires("lora-fuse") or []]
    return ">=3.11", [requirement for requirement, _, marker in pairs if marker in markers]


def python(needed: str, found: str = platform.python_version()) -> Finding:
    """Check the version of Python."""
    from packaging.specifiers import SpecifierSet

    if SpecifierSet(needed).contains(found, prereleases=True):
        return ok("Python", found, needed)
    return fail("Python", found, needed, "make PYTHON=python3.12 setup")


def packages(needed: Sequence[str]) -> Finding:
    """Check that every package is there, in a version of the project's range."""
    from packaging.requirements import Requirement

    versions: dict[str, str] = {}
    wrong: list[str] = []
    for requirement in map(Requirement, needed):
        if requirement.name == "lora-fuse" or (requirement.marker is not None and not requirement.marker.evaluate()):
            continue
        try:
            versions[requirement.name] = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement.name} is not installed (needs {requirement.specifier or 'any'})")
            continue
        if not requirement.specifier.contains(versions[requirement.name], prereleases=True):
            wrong.append(f"{requirement.name} {versions[requirement.name]} (needs {requirement.specifier})")
    if wrong:
        return fail("packages", ", ".join(wrong), "", INSTALL)
    shown = ", ".join(f"{name} {versions[name]}" for name in SHOWN if name in versions)
    return ok("packages", f"all {len(versions)} within pyproject's ranges: {shown}")


def command(name: str, remedy: str) -> Finding:
    """Check that a command is on PATH."""
    found = shutil.which(name)
    return ok(name, found) if found else fail(name, "not on PATH", "", remedy)


def determinism(environ: Mapping[str, str], *, on_gpu: bool) -> Finding:
    """Check that the environment overrides nothing that `regress` sets for the same bits twice."""
    name = "determinism"
    workspace = environ.get("CUBLAS_WORKSPACE_CONFIG")
    if on_gpu and workspace not in (None, *WORKSPACES):
        found = f"CUBLAS_WORKSPACE_CONFIG is {workspace}"
        return fail(name, found, " or ".join(WORKSPACES), "unset it: regress sets it itself")
    if on_gpu and environ.get("NVIDIA_TF32_OVERRIDE") == "1":
        found = "NVIDIA_TF32_OVERRIDE=1 makes every product TF32"
        return warn(name, found, "", "unset it, or pictures differ from the goldens")
    mine = [pin for pin, value in environment.CPU_PINS.items() if environ.get(pin, value) != value]
    if mine and not on_gpu:
        found = f"{', '.join(f'{pin}={environ[pin]}' for pin in mine)} is used in place of regress's own"
        return warn(name, found, "", "unset it, or goldens of other machines may not fit")
    return ok(name, "nothing in the environment is against it; regress sets the rest")
