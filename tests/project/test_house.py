"""The house's rules: rooms in one order, small faces, one owner for each heavy library, thin stages."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Collection, Mapping
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lora_fuse.errors import EXTRAS
from tests.support import tiny

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "lora_fuse"

# A room imports only from itself and from those before it.
ROOMS = (
    "machine",
    "quantisation",
    "checkpoint",
    "models",
    "lora",
    "recipe",
    "fusion",
    "verification",
    "exports",
    "hub",
    "pictures",
    "differences",
    "regression",
    "release",
    "rebuilding",
    "fleet",
    "studies",
)
DOORS = {"__init__", "__main__", "api", "cli"}
LARGEST_ROOM = 15  # modules
LARGEST_FACE = 12  # names, some of which are modules
PUBLIC_NAMES = 248  # of all faces together
# Of one or, where each has a use of its own, of few.
OWNERS: dict[str, str | tuple[str, ...]] = {
    "accelerate": "pictures",
    "cyclonedx": "release",
    "diffusers": "pictures",
    "gguf": ("checkpoint", "exports", "quantisation", "verification"),
    "huggingface_hub": "hub",
    "hydra": "stages",
    "llvmlite": "fusion",
    "model_signing": "release",
    "numba": ("fusion", "quantisation"),
    "omegaconf": "stages",
    "peft": "verification",
    "ray": "fleet",
    "safetensors": "verification",
    "securesystemslib": "rebuilding",
    "transformers": "pictures",
}


def modules(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if path.name != "__init__.py")


def room_of(path: Path) -> str:
    """The room that a file is in; a door of the library, and all of `stages`, may import from every room."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "lora_fuse" and len(parts) > 2 else parts[0]


@cache
def imported(path: Path) -> frozenset[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(names)


def rooms_imported(path: Path) -> set[str]:
    parts = [name.split(".") for name in imported(path)]
    return {part[1] for part in parts if part[0] == "lora_fuse" and len(part) > 1 and part[1] in ROOMS}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def only_offences(found: Mapping[str, Collection[str]]) -> dict[str, Collection[str]]:
    return {place: names for place, names in found.items() if names}


def test_a_room_imports_from_itself_and_from_those_before_it() -> None:
    offences = {}
    for path in modules(LIBRARY):
        forbidden = {name for name in imported(path) if name.split(".")[0] in ("stages", "pocket")}
        room = room_of(path)
        if room in ROOMS:
            forbidden |= rooms_imported(path) & set(ROOMS[ROOMS.index(room) + 1 :])
            forbidden |= imported(path) & {f"lora_fuse.{name}" for name in ("api", "cli", *faces()["lora_fuse"])}
        offences[name_of(path)] = forbidden
    assert only_offences(offences) == {}


@cache
def faces() -> dict[str, set[str]]:
    """What each room shows to the others, by its dotted name: the names in its stub."""
    found = {}
    for stub in sorted(LIBRARY.rglob("__init__.pyi")):
        imports = [
            node for node in ast.parse(stub.read_text(encoding="utf-8")).body if isinstance(node, ast.ImportFrom)
        ]
        names = {alias.name for node in imports for alias in node.names}
        found[".".join(stub.parent.relative_to(ROOT).parts)] = names
    return found


def face_of(module: str) -> str | None:
    """The face through which a module is imported from elsewhere; None if it is no room's."""
    rooms = (face for face in faces() if module == face or module.startswith(f"{face}."))
    return max((face for face in rooms if face != "lora_fuse"), key=len, default=None)


def test_a_face_is_small_and_so_are_all_together() -> None:
    assert {name.split(".")[1] for name in faces() if "." in name} == set(ROOMS)
    sizes = {room: len(names) for room, names in faces().items()}
    assert max(sizes.values()) <= LARGEST_FACE, sizes
    assert sum(sizes.values()) <= PUBLIC_NAMES, sizes


def test_everything_that_a_face_names_is_there() -> None:
    for room, names in faces().items():
        module = importlib.import_module(room)
        assert [name for name in names if getattr(module, name, None) is None] == [], room


def past_the_face(path: Path) -> list[str]:
    """Imports from other rooms that their faces do not name."""
    mine = face_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    past = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and (face := face_of(node.module)) not in (None, mine):
            shown = faces()[face] if node.module == face else set()
            past += [f"{node.module}.{alias.name}" for alias in node.names if alias.name not in shown]
    return past


def test_other_rooms_import_from_the_face_only() -> None:
    paths = [path for top in ("lora_fuse", "stages", "pocket", "benchmarks") for path in modules(ROOT / top)]
    assert only_offences({name_of(path): past_the_face(path) for path in paths}) == {}


def test_nothing_but_doors_errors_and_rooms_is_in_the_library() -> None:
    assert {path.stem for path in LIBRARY.glob("*.py")} == DOORS | {"errors"}
    assert {path.parent.name for path in LIBRARY.glob("*/__init__.py")} == set(ROOMS)


def test_a_room_is_small() -> None:
    sizes = Counter(path.parent for path in modules(LIBRARY))
    assert {name_of(room): size for room, size in sizes.items() if size > LARGEST_ROOM} == {}


def owners_of(library: str, anyone: str) -> tuple[str, ...]:
    """The rooms that may import a library; `anyone` of one that has no owner."""
    owners = OWNERS.get(library, anyone)
    return owners if isinstance(owners, tuple) else (owners,)


def test_a_heavy_library_belongs_to_few_rooms() -> None:
    offences = {}
    for path in [*modules(LIBRARY), *modules(ROOT / "stages")]:
        room = room_of(path)
        offences[name_of(path)] = [n for n in imported(path) if room not in owners_of(n.split(".")[0], room)]
    assert only_offences(offences) == {}


def test_every_library_is_the_core_s_or_has_an_extra_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = {"core": project["dependencies"], **project["optional-dependencies"]}
    declared = {name: {canonicalize_name(Requirement(line).name) for line in lines[name]} for name in lines}
    extra_of = {library: extra for extra, libraries in EXTRAS.items() for library in libraries}
    distributions = packages_distributions()
    paths = [path for top in ("lora_fuse", "stages") for path in modules(ROOT / top)]
    used = {name.partition(".")[0] for path in paths for name in imported(path)}
    for library in used - sys.stdlib_module_names - {"__future__", "lora_fuse", "pocket", "stages"}:
        extra = extra_of.get(library, "core")
        assert {canonicalize_name(name) for name in distributions[library]} & declared[extra], (library, extra)
    assert "lora-fuse[gguf,hub,torch]" in lines["pipeline"]
    assert "lora-fuse[fleet,pipeline,s3,sign,video]" in lines["dev"]


HEAVY = frozenset({"torch", "diffusers", "transformers", "huggingface_hub", "hydra", "omegaconf", "numpy"})
LIGHT = ("lora_fuse", "lora_fuse.cli", "stages.config", "stages.gate", "stages.summary", "lora_fuse.hub")
# The import of numba takes most of a second, and so it would of the process that publishes.
PLAIN = ("stages.publish", "stages.approve", "stages.verify", "stages.regress")
UNNEEDED = {**dict.fromkeys(LIGHT, HEAVY), **dict.fromkeys(PLAIN, frozenset({"numba"}))}


@pytest.mark.parametrize("module", UNNEEDED)
def test_start_up_imports_nothing_that_it_does_without(module: str) -> None:
    code = f"import sys, {module}; print(sorted({set(UNNEEDED[module])} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_plain_fuse_on_a_cpu_does_without_torch_and_the_hub_s_client(tmp_path: Path) -> None:
    """Its import takes seconds."""
    tiny.write_component(tmp_path / "base", tiny.weights())
    tiny.write_lora(tmp_path / "l.safetensors", tiny.lora_tensors("diffusers"))
    code = (
        "import sys; from lora_fuse.cli import main; code = main(sys.argv[1:]); "
        "print(code, *sorted({'torch', 'huggingface_hub'} & sys.modules.keys()))"
    )
    arguments = ["fuse", tmp_path / "base", tmp_path / "out", "--lora", tmp_path / "l.safetensors", "--scale", "1.0"]
    command = [sys.executable, "-c", code, *map(str, arguments), "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0"


def test_the_library_names_no_command_of_the_stages_and_no_dvc() -> None:
    command = re.compile(r"dvc repro|dvc checkout|dvc run|DVC_\w+|python -m stages")
    named = {name_of(path): command.findall(path.read_text(encoding="utf-8")) for path in modules(LIBRARY)}
    assert only_offences(named) == {}


def test_no_test_module_imports_from_another() -> None:
    """What several share is in `tests/support`."""
    shared = re.compile(r"tests\.(\w+\.)*test_")
    paths = (ROOT / "tests").rglob("*.py")
    assert only_offences({name_of(path): list(filter(shared.match, imported(path))) for path in paths}) == {}
