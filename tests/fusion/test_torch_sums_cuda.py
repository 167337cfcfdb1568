"""Laws of the fuse on a GPU: the same bytes as on the CPU. Skipped where there is none."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from lora_fuse.checkpoint.shards import open_checkpoint
from lora_fuse.fusion.merge import write_merged
from lora_fuse.fusion.plan import make_plan
from lora_fuse.lora.inputs import LoraInput
from tests.support.algorithms import ALGORITHMS, convolutions, example

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16], ids=["F32", "BF16", "F16"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_gpu_writes_the_bytes_that_a_cpu_writes(tmp_path: Path, name: str, dtype: type) -> None:
    target, parts, _ = example(name)
    module = target.rpartition(".")[0]
    base, lora = tmp_path / "base.safetensors", tmp_path / "lora.safetensors"
    save_file({key: tensor.astype(dtype) for key, tensor in convolutions().items()}, base)
    save_file({f"{module}.{end}": np.asarray(part) for end, part in parts.items()}, lora)
    plan = make_plan(open_checkpoint(base), [LoraInput("l", lora, 0.7)])
    for device in ("cpu", "cuda"):
        out = tmp_path / f"{device}.safetensors"
        write_merged(plan, out, device=device, generated={}, known={}, progress=lambda _: None)
    assert (tmp_path / "cuda.safetensors").read_bytes() == (tmp_path / "cpu.safetensors").read_bytes()
    assert load_file(tmp_path / "cpu.safetensors")[target].tobytes() != load_file(base)[target].tobytes()
