"""ComfyUI, from the folders that COMFYUI names, reads the exports whole and draws as diffusers does.

GGUF is read by ComfyUI-GGUF, where that is among the folder's `custom_nodes`. ComfyUI is in no package index:
`lora_fuse.exports.engine_keys` has its rules as data, and here they are held against its log.
"""

import os
import re
import runpy
from pathlib import Path

import pytest

from lora_fuse.exports import problems, readers_of
from lora_fuse.exports.engine_keys import NEWEST, VERSIONS
from tests.engines import denoiser
from tests.engines.conftest import CONFIG, EXPORTED, Answers, Exported, noted
from tests.engines.denoiser import Case

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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each format that ComfyUI reads, or a node of it that is there."""
    if "format_name" in metafunc.fixturenames:
        pairs = []
        for folder in FOLDERS:
            there = {"ComfyUI"} | {path.name for path in folder.glob("custom_nodes/ComfyUI-GGUF")}
            read = [name for name in EXPORTED if there & {engine.name for engine in readers_of(name)}]
            pairs += [(folder, name) for name in read]
        metafunc.parametrize(("folder", "format_name"), pairs)
