"""A 1-block Qwen-Image of real shapes, fused and exported by the stages, and the figures that the tests measured."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.make_checkpoint import Noise, make_lora, qwen_image_edit_config, tensor_shapes
from lora_fuse.exports.formats import FORMATS
from lora_fuse.exports.reading import read_export
from tests.engines import denoiser
from tests.engines.denoiser import Case

ROOT = Path(__file__).resolve().parents[2]
NAME = "one_block"
CONFIG = {**qwen_image_edit_config(1), "zero_cond_t": True}
RANK = 64
ALPHA = 16.0  # ||D|| is .05 of ||W||
SHARPNESS = 2.0  # of both sides of attention
Answers = dict[tuple[Case, bool], torch.Tensor]
FIGURES: list[str] = []  # lines of the table that the run ends with


@dataclass(frozen=True, slots=True)
class Answer:
    """Distance of an engine's answer from another: relative L2, and the cosine."""

    distance: float
    cosine: float

    @classmethod
    def of(cls, answer: torch.Tensor, other: torch.Tensor) -> "Answer":
        pair = torch.nn.functional.cosine_similarity(answer.flatten().double(), other.flatten().double(), dim=0)
        return cls(float((answer - other).norm() / other.norm()), float(pair))


def noted(engine: str, file: str, case: Case, answer: torch.Tensor, other: torch.Tensor, against: str) -> float:
    """Measure an answer, note the line, and give the distance."""
    found = Answer.of(answer, other)
    FIGURES.append(f"| {engine} | {file} | {case} | {against} | {found.distance:.1e} | {found.cosine:.8f} |")
    return found.distance


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if FIGURES:
        terminalreporter.write_line("| engine | file | latents | against | relative L2 | cosine |")
        terminalreporter.write_line("|---|---|---|---|---|---|")
        for line in FIGURES:
            terminalreporter.write_line(line)


@dataclass(slots=True)
class Exported:
    """A checkout with the merged checkpoint and its exports."""

    root: Path
    answers: dict[str, Answers] = field(default_factory=dict)  # of decoded weights, by format

    @property
    def merged(self) -> Path:
        return self.root / "artifacts/merged/transformer"

    def file(self, name: str) -> Path:
        """The file of a format, by its name."""
        return self.root / "artifacts/export" / FORMATS[name].place.format(NAME)

    def model(self) -> Any:
        """Diffusers' model of the merged folder, in float32."""
        from diffusers import QwenImageTransformer2DModel

        return QwenImageTransformer2DModel.from_pretrained(self.merged, torch_dtype=torch.float32).eval()

    def decoded(self, name: str) -> Answers:
        """Answers of diffusers in float32 with a format's weights as `read_export` gives them, see `answers_of`."""
        if name not in self.answers:
            model = self.model()
            weights = dict(model.named_parameters())
            for tensor, values in read_export(self.file(name), {one: tuple(w.shape) for one, w in weights.items()}):
                weights.pop(tensor).data.copy_(torch.from_numpy(values))
            assert not weights
            self.answers[name] = answers_of(model)
        return self.answers[name]


def answers_of(model: Any) -> Answers:
    """Answers of diffusers' model by case; True, with the text's places of stable-diffusion.cpp."""
    answers = {(one, False): denoiser.by_diffusers(model, one) for one in denoiser.CASES}
    with denoiser.text_positions_of_sdcpp(model):
        return answers | {(one, True): denoiser.by_diffusers(model, one) for one in denoiser.CASES}


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The merge of a 2511 (`zero_cond_t`) of one block with a LoRA, in every format."""
    root = tmp_path_factory.mktemp("exported")
    _make(root)
    stages(root, "download")
    stages(root, "fuse")
    stages(root, "export", f"export.formats=[{','.join(FORMATS)}]")
    return Exported(root)


def _make(root: Path) -> None:
    """Weights by diffusers' own initialisation, made to answer: as it is attention is even and a block adds little.

    With weights of unit gain and sharper attention an answer depends on each tensor and on every token's place.
    """
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(0)
    model = QwenImageTransformer2DModel.from_config(CONFIG).to(torch.bfloat16)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            weight.data *= 3**0.5  # uniform within 1 / sqrt(inputs) has a third of the variance
        elif ".attn.norm_" in name:
            weight.data *= SHARPNESS
    model.save_pretrained(root / "base/transformer")
    parts = {"scheduler": "FlowMatchEulerDiscreteScheduler", "transformer": "QwenImageTransformer2DModel"}
    index = {"_class_name": "QwenImageEditPlusPipeline", **{name: ["diffusers", kind] for name, kind in parts.items()}}
    (root / "base/model_index.json").write_text(json.dumps(index))
    (root / "base/scheduler").mkdir()
    (root / "base/scheduler/scheduler_config.json").write_text(json.dumps({"_class_name": parts["scheduler"]}))
    (root / "lora").mkdir()
    make_lora(root / "lora/lora.safetensors", tensor_shapes(CONFIG), RANK, ALPHA, Noise(1))
    (root / "conf").symlink_to(ROOT / "conf")


def stages(root: Path, stage: str, *overrides: str) -> None:
    given = ["base.path=base", "loras.lightning.path=lora", "loras.lightning.filename=lora.safetensors", f"name={NAME}"]
    command = [sys.executable, "-m", f"stages.{stage}", *given, *overrides]
    here = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, check=False, cwd=root, env=here, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture(scope="session", params=denoiser.CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


@pytest.fixture(scope="session")
def reference(exported: Exported) -> Answers:
    """Answers of diffusers in float32 from the merged folder, see `answers_of`."""
    return answers_of(exported.model())
