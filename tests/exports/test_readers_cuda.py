"""diffusers reads rows of float8 on a GPU by its products of 8 bits, which a CPU has not: the answers are near."""

import runpy
from pathlib import Path

import pytest
import torch

from benchmarks.make_checkpoint import qwen_image_edit_config
from lora_fuse.checkpoint import open_checkpoint
from lora_fuse.exports import FORMATS, export, readers_of

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

# Sizes that products of 8 bits take: multiples of 16.
CONFIG = {**qwen_image_edit_config(1), "num_attention_heads": 2, "joint_attention_dim": 256}
BOUND = 8e-2  # relative L2: activations are rounded to float8 too, by 2.6e-2 each


@pytest.mark.parametrize("name", ["single_file", "fp8_rows"])
def test_an_export_answers_on_a_gpu_as_on_a_cpu(tmp_path: Path, name: str) -> None:
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(0)
    folder = tmp_path / "merged/transformer"
    QwenImageTransformer2DModel.from_config(CONFIG).to(torch.bfloat16).save_pretrained(folder)
    export(open_checkpoint(folder), tmp_path / "export", [name], name="x", metadata={}, progress=lambda _: None)
    (engine,) = [engine for engine in readers_of(name) if engine.name == "diffusers"]
    file = tmp_path / "export" / FORMATS[name].place.format("x")
    (tmp_path / "load.py").write_text(engine.loading(str(file), str(folder.parent), "QwenImageTransformer2DModel"))
    answers = []
    for device in ("cpu", "cuda"):
        model = runpy.run_path(str(tmp_path / "load.py"))["transformer"].to(device)
        generator = torch.Generator().manual_seed(0)
        tokens, text = (torch.randn(1, n, width, generator=generator) for n, width in ((256, 64), (16, 256)))
        given = [tensor.to(device, torch.bfloat16) for tensor in (tokens, text)]
        with torch.no_grad():
            step = torch.tensor([0.75], device=device)
            answers.append(model(*given, timestep=step, img_shapes=[[(1, 16, 16)]], return_dict=False)[0].float().cpu())
    cpu, gpu = answers
    assert float((gpu - cpu).norm() / cpu.norm()) < BOUND
