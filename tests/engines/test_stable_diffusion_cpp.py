"""stable-diffusion.cpp 0.4.7 draws from the exports as diffusers does from the merged folder."""

import shutil
import subprocess

import pytest
import torch

from lora_fuse.exports import readers_of
from tests.engines import denoiser
from tests.engines.conftest import Answers, Exported, noted
from tests.engines.denoiser import Case

pytestmark = pytest.mark.engines

ENGINE = "stable-diffusion.cpp 0.4.7"
FLAG = b"__index_timestep_zero__"
PLACES = "merged, its text positions"
UNREAD = {"int8_convrot": "unsupported dtype 'I8'", "fp8_scaled": ".weight_scale"}  # its words


def test_a_single_file_is_drawn_as_by_diffusers(exported: Exported, reference: Answers, case: Case) -> None:
    """Float32: 4.5e-5 was measured; with the text at diffusers' places 5.1e-2, the engine's own."""
    answer, log = denoiser.by_stable_diffusion_cpp(exported.file("single_file"), case, widened=True)
    assert "is qwen_image" in log
    assert "use zero_cond_t" in log
    name = "single_file, as float32"
    assert noted(ENGINE, name, case, answer, reference[case, True], PLACES) < 1e-4
    assert 1e-2 < noted(ENGINE, name, case, answer, reference[case, False], "merged") < 1e-1


def test_a_single_file_in_bfloat16(exported: Exported, reference: Answers, case: Case) -> None:
    """2.7e-3 was measured, which is bfloat16's."""
    answer, _ = denoiser.by_stable_diffusion_cpp(exported.file("single_file"), case)
    assert noted(ENGINE, "single_file", case, answer, reference[case, True], PLACES) < 6e-3


@pytest.mark.parametrize(("name", "bound"), [("gguf_q8_0", 8e-3), ("gguf_q4_k", 6e-2)])
def test_a_gguf_is_drawn_as_by_diffusers(
    exported: Exported, reference: Answers, case: Case, name: str, bound: float
) -> None:
    """4.0e-3 was measured: ggml multiplies Q8_0 by activations of 8 bits."""
    answer, log = denoiser.by_stable_diffusion_cpp(exported.file(name), case)
    assert "use zero_cond_t" in log
    assert noted(ENGINE, name, case, answer, reference[case, True], PLACES) < bound
    widened, _ = denoiser.by_stable_diffusion_cpp(exported.file(name), case, widened=True)
    decoded = exported.decoded(name)[case, True]
    assert noted(ENGINE, f"{name}, as float32", case, widened, decoded, "decoded by us, its text positions") < 1e-4


def test_without_the_flag_an_edit_is_drawn_in_the_older_way(exported: Exported, reference: Answers) -> None:
    """A control: the same weights without `__index_timestep_zero__`, 3.0e-1 on two blocks, 5.7e-2 here."""
    file = exported.project.root / "no_flag.safetensors"
    shutil.copy2(exported.file("single_file"), file)
    with file.open("r+b") as opened:
        start = opened.read(1 << 20)
        opened.seek(start.index(FLAG))
        opened.write(FLAG.replace(b"zero", b"none"))
    try:
        answer, log = denoiser.by_stable_diffusion_cpp(file, denoiser.EDIT, widened=True)
    finally:
        file.unlink()
    assert "use zero_cond_t" not in log
    other = reference[denoiser.EDIT, True]
    assert noted(ENGINE, "single_file without its flag", denoiser.EDIT, answer, other, PLACES) > 2e-2


@pytest.mark.parametrize("name", UNREAD)
def test_formats_that_it_does_not_read_are_told(exported: Exported, reference: Answers, name: str) -> None:
    """`readers_of` names no version of it that was run; the one that is built says so, of fp8 in its log only."""
    assert not any(engine.ran for engine in readers_of(name) if engine.name == "stable-diffusion.cpp")
    try:
        answer, log = denoiser.by_stable_diffusion_cpp(exported.file(name), denoiser.PICTURE)
    except subprocess.CalledProcessError as error:
        answer, log = torch.tensor(torch.nan), error.stderr
    assert UNREAD[name] in log
    assert not float((answer - reference[denoiser.PICTURE, True]).norm() / answer.norm()) < 0.1
