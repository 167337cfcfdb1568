"""The wheel: `lora_fuse` alone, which fuses and verifies plain LoRAs without torch and names the extra of the rest."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest

from lora_fuse.errors import EXTRAS, MissingExtra, naming_extras, require
from tests.support import tiny

ROOT = Path(__file__).resolve().parents[2]
LARGEST = 350e6  # bytes of site-packages


def tracked(*patterns: str) -> list[Path]:
    """Files of the checkout, also those that no commit has yet."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *patterns]
    listed = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [Path(name) for name in listed.split("\0") if name and (ROOT / name).is_file()]


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: a build in the checkout would leave a folder there."""
    source = tmp_path_factory.mktemp("source")
    for path in tracked(":!artifacts"):
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_bytes((ROOT / path).read_bytes())
    pip("wheel", "--quiet", "--no-deps", "--wheel-dir", source / "wheels", source)
    (built,) = (source / "wheels").glob("lora_fuse-*.whl")
    return built


@pytest.fixture(scope="module")
def commands(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands of an environment that has the wheel, what it depends on, and nothing else."""
    folder = tmp_path_factory.mktemp("core")
    venv.create(folder, with_pip=False)
    pip("--python", folder / "bin/python", "install", "--quiet", "--no-compile", "-c", ROOT / "constraints.txt", wheel)
    return folder / "bin"


def run(*command: object) -> subprocess.CompletedProcess[str]:
    """Run a command out of the checkout's reach."""
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    cwd = Path(str(command[0])).parent
    return subprocess.run([*map(str, command)], cwd=cwd, env=environ, capture_output=True, text=True, check=False)


def test_the_wheel_holds_the_library_alone_and_whole(wheel: Path) -> None:
    names = {Path(name) for name in zipfile.ZipFile(wheel).namelist()}
    assert {name.parts[0].partition("-")[0] for name in names} == {"lora_fuse"}
    missing = set(tracked("lora_fuse")) - names
    assert not missing
    assert {"__init__.pyi", "py.typed", "report.html.j2", "style.css"} <= {name.name for name in names}


def test_the_core_is_light(commands: Path) -> None:
    (site,) = commands.parent.glob("lib/python3*/site-packages")
    size = sum(path.lstat().st_blocks * 512 for path in site.rglob("*"))
    print(f"site-packages: {size / 1e6:.0f} MB")
    assert size < LARGEST
    absent = {library for libraries in EXTRAS.values() for library in libraries} - {"packaging"}  # lazy-loader's too
    code = "import sys; from importlib.util import find_spec; print([name for name in sys.argv[1:] if find_spec(name)])"
    assert run(commands / "python", "-c", code, *sorted(absent), "stages", "pocket").stdout == "[]\n"


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """A plain LoRA, of a bias too."""
    bias = {"transformer.transformer_blocks.0.attn.to_q.lora_B.bias": np.ones(24, np.float32)}
    return tiny.write_lora(tmp_path / "l.safetensors", tiny.lora_tensors("diffusers") | bias)


def fuse_with_torch(base: Path, out: Path, lora: Path, scale: float) -> None:
    """Fuse in the environment of the tests."""
    arguments = map(str, ["fuse", base, out, "--lora", lora, "--scale", scale])
    subprocess.run([sys.executable, "-m", "lora_fuse", *arguments], cwd=ROOT, capture_output=True, check=True)


def test_the_core_inspects_plans_fuses_and_verifies(commands: Path, tmp_path: Path, lora: Path) -> None:
    base, out = tiny.write_pipeline(tmp_path / "base", tiny.weights()), tmp_path / "out"
    for command in (
        ("inspect", lora),
        ("plan", base, "--lora", lora),
        ("fuse", base, out, "--lora", lora, "--scale", 0.8),
        ("verify", out, base, "--lora", lora, "--scale", 0.8, "--rows", "all"),
    ):
        done = run(commands / "lora-fuse", *command)
        said = [line for line in done.stderr.splitlines() if " left" not in line]  # progress, on a slow machine
        assert (done.returncode, said) == (0, []), done.stderr
    assert done.stdout.endswith("verify: passed\n")
    (out / "lora_fuse.json").write_bytes((tmp_path / "out.manifest.json").read_bytes())
    assert run(commands / "lora-fuse", "verify", out).stdout.endswith("download: passed, unsigned\n")
    wrong = run(commands / "lora-fuse", "verify", out, base, "--lora", lora, "--scale", 0.7)
    assert wrong.returncode == 1
    fuse_with_torch(base, tmp_path / "here", lora, 0.8)
    assert {path.name: path.read_bytes() for path in (out / "transformer").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "here/transformer").iterdir()
    }


def loha_tensors() -> dict[str, tiny.Array]:
    sizes = {"hada_w1_a": (24, 2), "hada_w1_b": (2, 16), "hada_w2_a": (24, 2), "hada_w2_b": (2, 16)}
    rng = np.random.default_rng(0)
    prefix = "transformer_blocks.0.attn.to_q"
    return {f"{prefix}.{name}": rng.standard_normal(size).astype(np.float32) for name, size in sizes.items()}


@pytest.mark.parametrize(
    ("command", "kind"),
    [("plan", "float32"), ("plan", "LoHa"), ("fuse", "float32"), ("fuse", "LoHa"), ("fuse", "cuda")],
)
def test_a_fuse_that_needs_torch_is_refused_and_leaves_nothing(
    commands: Path, tmp_path: Path, command: str, kind: str
) -> None:
    base = tiny.write_pipeline(tmp_path / "base", tiny.weights(np.float32 if kind == "float32" else tiny.BF16))
    lora = tiny.write_lora(tmp_path / "l.safetensors", loha_tensors() if kind == "LoHa" else tiny.lora_tensors())
    before = sorted(tmp_path.rglob("*"))
    out = [tmp_path / "out", "--device", "cuda" if kind == "cuda" else "auto"] if command == "fuse" else []
    refused = run(commands / "lora-fuse", command, base, *out, "--lora", lora)
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert line.startswith("error: ")
    assert {"float32": "F32", "LoHa": "LoHa", "cuda": "device cuda"}[kind] in line
    assert line.endswith("needs torch, which is not installed: pip install 'lora-fuse[torch]'")
    assert sorted(tmp_path.rglob("*")) == before


def test_the_core_verifies_what_it_does_not_fuse(commands: Path, tmp_path: Path) -> None:
    base = tiny.write_component(tmp_path / "base", tiny.weights(np.float32))
    lora, out = tiny.write_lora(tmp_path / "l.safetensors", loha_tensors()), tmp_path / "out"
    fuse_with_torch(base, out, lora, 1.0)
    for scale, code in ((1.0, 0), (0.9, 1)):
        assert run(commands / "lora-fuse", "verify", out, base, "--lora", lora, "--scale", scale).returncode == code


def test_a_sum_that_may_be_too_large_is_refused_and_leaves_nothing(commands: Path, tmp_path: Path, lora: Path) -> None:
    weights = {name: np.full_like(values, 3e4) for name, values in tiny.weights(np.float16).items()}
    base = tiny.write_component(tmp_path / "base", weights)
    refused = run(commands / "lora-fuse", "fuse", base, tmp_path / "out", "--lora", lora)
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert line.endswith("needs torch, which is not installed: pip install 'lora-fuse[torch]'")
    assert {path.name for path in tmp_path.iterdir()} <= {"base", "l.safetensors", ".out.lock"}


def test_a_signature_is_refused_before_anything_is_read(commands: Path, tmp_path: Path) -> None:
    (tmp_path / "lora_fuse.json").write_text("{}")
    (tmp_path / "key.pub").write_text("a key")
    refused = run(commands / "lora-fuse", "verify", tmp_path, "--public-key", tmp_path / "key.pub")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == (
        "error: a signature needs model_signing, which is not installed: pip install 'lora-fuse[sign]'\n"
    )


@pytest.mark.parametrize(
    ("module", "call", "extra"),
    [("lora_fuse.hub", "client.client()", "hub"), ("lora_fuse.fusion", "device.resolve_device('cuda')", "torch")],
)
def test_a_caller_of_the_library_is_told_the_extra(commands: Path, module: str, call: str, extra: str) -> None:
    name = call.partition(".")[0]
    code = f"from {module} import {name}\nfrom lora_fuse.errors import MissingExtra\ntry: {call}\n"
    code += "except MissingExtra as error: print(error)"
    assert f"pip install 'lora-fuse[{extra}]'" in run(commands / "python", "-c", code).stdout


def test_a_stage_names_its_extra(commands: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import stages.gate"
    refused = run(commands / "python", "-c", code)
    assert refused.returncode == 2
    assert refused.stderr == "error: a stage needs hydra, which is not installed: pip install 'lora-fuse[pipeline]'\n"


def test_only_what_an_extra_brings_is_refused_by_its_name() -> None:
    with pytest.raises(MissingExtra, match="a picture needs PIL"), naming_extras("a picture"):
        raise ModuleNotFoundError(name="PIL")
    with pytest.raises(ModuleNotFoundError), naming_extras("a picture"):
        raise ModuleNotFoundError(name="PIL.inside")  # installed, and broken
    require("torch", "nothing")
