"""ComfyUI, from the folders that COMFYUI names, reads the exports whole and draws as diffusers does.

GGUF is read by ComfyUI-GGUF, where that is among the folder's `custom_nodes`. ComfyUI is in no package index:
`lora_fuse.exports.engine_keys` has its rules as data, and here they are held against its log.
"""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_fuse.differences.explaining import explain
from lora_fuse.differences.explaining.explain_verdict import verdict
from lora_fuse.exports import problems, readers_of
from lora_fuse.exports.engine_keys import NEWEST, VERSIONS
from tests.engines import denoiser
from tests.engines.conftest import CONFIG, EXPORTED, FIGURES, Answers, Exported, noted
from tests.engines.denoiser import Case

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = [Path(folder) for folder in os.environ.get("COMFYUI", "").split(os.pathsep) if folder]
pytestmark = [pytest.mark.engines, pytest.mark.skipif(not FOLDERS, reason="COMFYUI names no folder")]

MISREAD = re.compile(r"unet (?:missing|unexpected): .*|left over keys .*")
# Relative L2 to the merged checkpoint, twice what was measured with 0.29.0, and to the weights as decoded here.
# In int8 ComfyUI rounds activations too.
BOUNDS = {
    "single_file": (1e-6, 1e-6),
    "int8_convrot": (1.1e-2, 8e-3),
    "fp8_scaled": (2e-2, 1e-6),
    "mxfp8": (2e-2, 1e-6),
    "nvfp4": (8e-2, 1e-6),
    "gguf_q8_0": (4e-3, 2e-4),
    "gguf_q4_k": (5e-2, 6e-4),
}


def version(folder: Path) -> str:
    return str(runpy.run_path(str(folder / "comfyui_version.py"))["__version__"])


def test_a_file_is_read_whole_and_drawn(
    exported: Exported, reference: Answers, folder: Path, format_name: str, case: Case
) -> None:
    """Or it is told beforehand that it is not: the version of 2025 knows neither marks nor the flag of 2511."""
    engine = f"ComfyUI {version(folder)}"
    file = exported.file(format_name)
    told = problems(file, CONFIG, version(folder) if version(folder) in VERSIONS else NEWEST)
    answer, log = denoiser.by_comfyui(folder, file, case)
    if answer is None:
        assert told, log
        return
    assert bool(MISREAD.findall(log)) == bool(told), (MISREAD.findall(log), told)
    merged = noted(engine, format_name, case, answer, reference[case, False], "merged")
    decoded = noted(engine, format_name, case, answer, exported.decoded(format_name)[case, False], "decoded by us")
    if not told:
        assert (merged <= BOUNDS[format_name][0], decoded <= BOUNDS[format_name][1]) == (True, True)


DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
SCALES = {"one": 0.8, "two": 0.6}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["BF16", "F16"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("folder", FOLDERS, ids=version)
def test_what_it_merges_is_told_with_its_scales(tmp_path: Path, folder: Path, device: str, dtype: torch.dtype) -> None:
    stream = torch.Generator().manual_seed(0)
    names = [f"transformer_blocks.{block}.attn.to_{kind}" for block in range(4) for kind in "qkv"]
    base = {f"{name}.weight": (torch.randn(64, 96, generator=stream) * 0.05).to(dtype) for name in names}
    save_file(base, tmp_path / "base.safetensors")
    command: list[str | Path] = [os.environ.get("COMFYUI_PYTHON", sys.executable), "-m", "tests.engines.comfyui_merge"]
    command += [folder, device, tmp_path / "base.safetensors", tmp_path / "made.safetensors"]
    loras = []
    for label, scale in SCALES.items():
        factors = {}
        for name in names:
            factors[f"{name}.lora_down.weight"] = torch.randn(4, 96, generator=stream) * 0.1
            factors[f"{name}.lora_up.weight"] = torch.randn(64, 4, generator=stream) * 0.05
            factors[f"{name}.alpha"] = torch.tensor(3.0)
        loras.append(tmp_path / f"{label}.safetensors")
        save_file(factors, loras[-1])
        command += [loras[-1], str(scale)]
    run = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert not run.returncode, run.stderr
    explained = explain(tmp_path / "made.safetensors", tmp_path / "base.safetensors", loras)
    told = verdict(explained)
    FIGURES.append(
        f"| ComfyUI {version(folder)} | merge on {device} | {dtype} | {told} | {explained.missed} missed | |"
    )
    assert {one.name: one.scale for one in explained.loras} == SCALES
    assert explained.missed <= 1e-3 * explained.moved
    assert not explained.unexplained
    if dtype == torch.float16 and "twice" in told:
        assert device == "cuda"  # a sum in float16 is what diffusers makes on a CPU
    else:
        assert "as ComfyUI does" in told


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each format that ComfyUI reads, or a node of it that is there."""
    if "format_name" in metafunc.fixturenames:
        pairs = []
        for folder in FOLDERS:
            there = {"ComfyUI"} | {path.name for path in folder.glob("custom_nodes/ComfyUI-GGUF")}
            read = [name for name in EXPORTED if there & {engine.name for engine in readers_of(name)}]
            pairs += [(folder, name) for name in read]
        metafunc.parametrize(("folder", "format_name"), pairs)
