"""A 1-block Qwen-Image of real shapes, fused and exported by the stages, and the figures that the tests measured."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.export_project import ExportProject
from benchmarks.make_checkpoint import qwen_image_edit_config, tensor_shapes
from lora_fuse.exports.formats import FORMATS
from lora_fuse.exports.reading import read_export
from tests.engines import denoiser
from tests.engines.denoiser import Case

EXPORTED = ("single_file", "int8_convrot", "gguf_q8_0", "fp8_scaled", "fp8_rows", "mxfp8", "nvfp4", "gguf_q4_k")
CONFIG = {**qwen_image_edit_config(1), "zero_cond_t": True}
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
    """A project with the merged checkpoint and its exports."""

    project: ExportProject
    answers: dict[str, Answers] = field(default_factory=dict)  # of decoded weights, by format

    def file(self, name: str) -> Path:
        """The file of a format, by its name."""
        return self.project.exported / FORMATS[name].place.format(self.project.name)

    def model(self) -> Any:
        """Diffusers' model of the merged folder, in float32."""
        from diffusers import QwenImageTransformer2DModel

        return QwenImageTransformer2DModel.from_pretrained(
            self.project.merged, subfolder="transformer", torch_dtype=torch.float32
        ).eval()

    def decoded(self, name: str) -> Answers:
        """Answers of diffusers in float32 with a format's weights as `read_export` gives them, see `answers_of`."""
        if name not in self.answers:
            model = self.model()
            weights = dict(model.named_parameters())
            for tensor, values in read_export(self.file(name), {one: tuple(w.shape) for one, w in weights.items()}):
                weights.pop(tensor).data.copy_(torch.tensor(values))
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
    """The merge of a 2511 (`zero_cond_t`) of one block with a LoRA, in every format of which a test asks."""
    project = ExportProject(tmp_path_factory.mktemp("exported"), "one_block")
    _make_base(project.base)
    project.make(tensor_shapes(CONFIG), ALPHA)
    project.run("download")
    project.run("fuse")
    program = Path(sys.executable).parent / "sd-cli"
    project.run("export", f"export.formats=[{','.join(EXPORTED)}]", f"export.sd_cli={program}")
    return Exported(project)


def _make_base(folder: Path) -> None:
    """Write weights by diffusers' own initialisation, made to answer: as it is a block adds little, and looks evenly.

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
    model.save_pretrained(folder)


@pytest.fixture(scope="session", params=denoiser.CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


@pytest.fixture(scope="session")
def reference(exported: Exported) -> Answers:
    """Answers of diffusers in float32 from the merged folder, see `answers_of`."""
    return answers_of(exported.model())
