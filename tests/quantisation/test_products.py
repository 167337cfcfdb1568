"""Codes as engines compute with them: in products of 8 bits, on a CPU and by a GPU's kernels."""

import numpy as np
import pytest
import torch
from diffusers.quantizers.bfl.utils import BFLFP8RLinear

from lora_fuse.quantisation import FORMATS, Fp8Options
from tests.support.matrices import matrix

GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")],
)
SHAPE = (64, 512)
INPUTS = torch.from_numpy(matrix(shape=(32, 512), seed=5))


def meant() -> torch.Tensor:
    return INPUTS @ torch.from_numpy(matrix("outliers", SHAPE)).T


def apart(one: torch.Tensor) -> float:
    return float((one.cpu().float() - meant()).norm() / meant().norm())


def hadamard(size: int) -> torch.Tensor:
    """The regular Hadamard matrix by its definition, a Kronecker power."""
    four = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
    made = torch.ones(1, 1)
    while len(made) < size:
        made = torch.kron(made, four)
    return made


def int8_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A product in int32; on a CPU without VNNI, or with ONEDNN_MAX_CPU_ISA=AVX2, torch's own saturates at 16 bits."""
    return torch._int_mm(a, b) if a.is_cuda else (a.double() @ b.double()).to(torch.int32)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("group", [256, 64])
def test_int8_is_multiplied_with_inputs_that_are_rotated_alike(device: str, group: int) -> None:
    """As comfy-kitchen does: inputs rotated in the same groups, a scale a row, a product of int8 in int32."""
    stored = FORMATS["int8_convrot"].encode(matrix("outliers", SHAPE), Fp8Options())
    rotated = (INPUTS.reshape(32, -1, group) @ hadamard(group)).reshape(32, -1).to(device)
    scale = rotated.abs().amax(1, keepdim=True) / 127
    codes = torch.from_numpy(stored["weight"].view(np.int8)).to(device)
    product = int8_product((rotated / scale).round().to(torch.int8), codes.T)
    answer = product * scale * torch.from_numpy(stored["weight_scale"].astype(np.float32)).to(device).T
    assert (apart(answer) < 2e-2) == (group == 256)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_fp8_by_rows_is_multiplied_by_diffusers_own_layer(device: str) -> None:
    """On a GPU of compute capability 8.9 and above by `torch._scaled_mm`, inputs in fp8 too."""
    stored = FORMATS["fp8_rows"].encode(matrix("outliers", SHAPE), Fp8Options())
    layer = BFLFP8RLinear(512, 64, bias=False, compute_dtype=torch.float32, device=device)
    codes = torch.from_numpy(stored["weight"].view(np.uint8)).view(torch.float8_e4m3fn)
    layer.weight = torch.nn.Parameter(codes.to(device), requires_grad=False)
    layer.weight_scale = torch.from_numpy(stored["weight_scale"].astype(np.float32)).to(device)
    with torch.no_grad():
        assert 1e-3 < apart(layer(INPUTS.to(device))) < (6e-2 if device == "cuda" else 4e-2)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_fp8_with_one_scale_is_multiplied_by_a_gpu_s_kernel() -> None:
    """As ComfyUI does where it may: `torch._scaled_mm` with a scale of each matrix."""
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("the GPU has no product of fp8")
    stored = FORMATS["fp8_scaled"].encode(matrix("outliers", SHAPE), Fp8Options())
    codes = torch.from_numpy(stored["weight"].view(np.uint8)).view(torch.float8_e4m3fn).cuda()
    scale = torch.from_numpy(stored["weight_scale"].astype(np.float32)).cuda()
    ours = INPUTS.abs().max() / 448
    inputs = (INPUTS / ours).to(torch.float8_e4m3fn).cuda()
    answer = torch._scaled_mm(inputs, codes.T, ours.cuda(), scale.reshape(()), out_dtype=torch.float32)
    assert 1e-3 < apart(answer) < 6e-2
