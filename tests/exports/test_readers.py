"""The ways to load an export, as the card gives them: those of diffusers are run here, on pocket."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_fuse.checkpoint import open_checkpoint
from lora_fuse.exports import FORMATS, ExportOptions, export, problems, read_export, readers_of

POCKET = Path(__file__).resolve().parents[2] / "pocket/model"
KIND = "QwenImageTransformer2DModel"
# Blocks of 32 do not divide pocket's 120 columns; its 480 they do.
ONLY_480 = ("transformer_blocks.*.attn.*", "transformer_blocks.*.net.0.proj")
# Relative L2 of a forward to the weights as they are decoded here, both in bfloat16; diffusers decodes GGUF in float16.
BOUNDS = {"single_file": 0.0, "fp8_rows": 1e-2, "gguf_q8_0": 1e-2}


def answer(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    tokens, text = (torch.randn(1, n, 64, generator=generator).bfloat16() for n in (16, 5))
    with torch.no_grad():
        step = torch.tensor([0.75])
        found = model(tokens, text, timestep=step, img_shapes=[[(1, 4, 4)]], return_dict=False)[0]
    return found.float()  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", BOUNDS)
def test_an_export_loads_in_diffusers_as_is_said(tmp_path: Path, name: str) -> None:
    from diffusers import QwenImageTransformer2DModel

    options = ExportOptions(keep=ONLY_480 if name.startswith("gguf") else ())
    checkpoint = open_checkpoint(POCKET, "transformer")
    export(checkpoint, tmp_path, [name], name="x", metadata={}, progress=lambda _: None, options=options)
    file = tmp_path / FORMATS[name].place.format("x")
    (engine,) = [engine for engine in readers_of(name) if engine.name == "diffusers"]
    (tmp_path / "load.py").write_text(engine.loading(str(file), str(POCKET), KIND))
    loaded = runpy.run_path(str(tmp_path / "load.py"))["transformer"]
    model = QwenImageTransformer2DModel.from_pretrained(POCKET, subfolder="transformer", torch_dtype=torch.bfloat16)
    weights = dict(model.named_parameters())
    for tensor, values in read_export(file, {one: tuple(weight.shape) for one, weight in weights.items()}):
        weights.pop(tensor).data.copy_(torch.tensor(values))
    assert not weights
    ours = answer(model)
    assert float((answer(loaded) - ours).norm() / ours.norm()) <= BOUNDS[name]
    assert problems(file, checkpoint.config) == []


def test_every_format_has_a_reader_that_drew_from_it() -> None:
    assert all(any(engine.ran for engine in readers_of(name)) for name in FORMATS)
    assert readers_of("zip") == ()


def test_a_way_to_load_names_the_file() -> None:
    for name in FORMATS:
        for engine in readers_of(name):
            loading = engine.loading("a/file", "owner/name", KIND)
            assert "a/file" in loading
            assert not {"{file}", "{repository}", "{kind}"} & set(loading.split())
