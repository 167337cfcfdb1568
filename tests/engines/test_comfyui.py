"""ComfyUI, from the folder that COMFYUI names, reads the exports whole and draws as diffusers does.

It is in no package index. `lora_fuse.exports.engine_keys` has its rules as data; here they are held against its log.
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

FOLDER = os.environ.get("COMFYUI")
pytestmark = [pytest.mark.engines, pytest.mark.skipif(FOLDER is None, reason="COMFYUI names no folder")]

MISREAD = re.compile(r"unet (?:missing|unexpected): .*|left over keys .*")
# Relative L2 to the merged checkpoint, twice what was measured with 0.29.0, and to the weights as decoded here.
# In int8 ComfyUI rounds activations too.
BOUNDS = {
    "single_file": (1e-6, 1e-6),
    "int8_convrot": (1.1e-2, 8e-3),
    "fp8_scaled": (2e-2, 1e-6),
    "mxfp8": (2e-2, 1e-6),
    "nvfp4": (8e-2, 1e-6),
}


def version() -> str:
    return str(runpy.run_path(str(Path(FOLDER or "") / "comfyui_version.py"))["__version__"])


def test_a_file_is_read_whole_and_drawn(exported: Exported, reference: Answers, format_name: str, case: Case) -> None:
    """Or it is told beforehand that it is not: the version of 2025 knows neither marks nor the flag of 2511."""
    known = version() if version() in VERSIONS else NEWEST
    file = exported.file(format_name)
    told = problems(file, CONFIG, known)
    answer, log = denoiser.by_comfyui(Path(FOLDER or ""), file, case)
    assert bool(MISREAD.findall(log)) == bool(told), (MISREAD.findall(log), told)
    engine = f"ComfyUI {version()}"
    merged = noted(engine, format_name, case, answer, reference[case, False], "merged")
    decoded = noted(engine, format_name, case, answer, exported.decoded(format_name)[case, False], "decoded by us")
    if not told:
        assert (merged <= BOUNDS[format_name][0], decoded <= BOUNDS[format_name][1]) == (True, True)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each format that ComfyUI reads itself."""
    if "format_name" in metafunc.fixturenames:
        read = [name for name in EXPORTED if any(engine.name == "ComfyUI" for engine in readers_of(name))]
        metafunc.parametrize("format_name", read)
