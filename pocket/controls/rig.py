"""What all controls share: the recipe, the right merge and its pictures, base + LoRA unfused; and the judge."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from lora_fuse.checkpoint import open_checkpoint
from lora_fuse.fusion import FuseJob, Plan, make_plan
from lora_fuse.lora import LoraInput, Selection
from lora_fuse.models import COMPONENT
from lora_fuse.pictures import Case, environment, pairs, picture, render
from lora_fuse.recipe import Recipe
from lora_fuse.regression import case_judgement, verdicts
from lora_fuse.verification import Expectation, verify_merge
from pocket.controls.control import Built, Control, Outcome
from stages.config import load

RECIPE = "pocket_photo"  # its photograph sees more than any drawing
NAME = "lightning"  # of the LoRA in the recipe


class Rig:
    """Builds, renders and judges; made in the project's folder, as the recipe's paths are relative.

    The right merge is rendered once, and its pictures are the goldens; text encoder and VAE are loaded once.
    """

    def __init__(self, rules: verdicts.Rules | None = None, recipe: str = RECIPE) -> None:
        self.params: Recipe = load([f"recipe={recipe}"])
        self.setup, self.cases = pairs.Setup.of(self.params), Case.of(self.params)
        self.rules = rules or verdicts.Rules.of(self.params)
        self.base = Path(str(self.params.base.path))
        self.loras = self.base.parent / "lora"
        self.lora = self.loras / self.params.loras[NAME].filename
        self._exit = ExitStack()

    def __enter__(self) -> Rig:
        threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
        self._exit.callback(torch.set_num_threads, threads)
        self._exit.callback(torch.use_deterministic_algorithms, strict)
        self._work = Path(self._exit.enter_context(tempfile.TemporaryDirectory(prefix="controls-")))
        environment.make_deterministic(self.params.regress.threads, on_gpu=self.setup.placement != "cpu")
        self.right = self.merge(self._work / "right")
        pipe = render.load_pipeline(self.right, self.setup.pipeline, dtype=self.setup.dtype)
        self.shared = render.shared_components(pipe)
        pictures = self.render(pipe)
        self.unfused = pairs.render_references(self.plan(), self.cases, self.setup, self.shared)
        floors = [
            verdicts.compare(floor, unfused).values
            for floor, unfused in zip(self.unfused.floor, self.unfused.unfused, strict=True)
        ]
        self.goldens = {
            case.name: [verdicts.Golden(right.levels, name=f"{case.name}.png", floor=floor)]
            for case, right, floor in zip(self.cases, pictures, floors, strict=True)
        }
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def plan(
        self,
        *loras: Path,
        scale: float | None = None,
        selection: Selection | None = None,
        base: Path | None = None,
    ) -> Plan:
        """The recipe's fuse, or another; `loras` are files."""
        scale = self.params.fuse.scale_of(NAME) if scale is None else scale
        inputs = [LoraInput(NAME, path, scale) for path in loras or (self.lora,)]
        return make_plan(open_checkpoint(base or self.base, COMPONENT), inputs, selection)

    def merge(self, out: Path, plan: Plan | None = None, scheduler: Mapping[str, object] | None = None) -> Path:
        """Write a merged repository, by default the recipe's; an empty scheduler keeps the base's."""
        scheduler = self.setup.scheduler if scheduler is None else scheduler
        pipeline = self.setup.pipeline
        FuseJob.of(plan or self.plan(), out, device="cpu", pipeline=pipeline, scheduler=scheduler).run()
        return out

    def load(self, folder: Path) -> render.Pipeline:
        """Load a merged repository; all but its transformer and scheduler is what is loaded already."""
        return render.load_pipeline(folder, self.setup.pipeline, dtype=self.setup.dtype, shared=self.shared)

    def render(
        self, pipe: render.Pipeline, cases: Sequence[Case] | None = None, steps: int | None = None
    ) -> list[picture.Rendered]:
        """One picture a case, by default the recipe's cases in the recipe's steps."""
        sampling = self.setup.sampling if steps is None else replace(self.setup.sampling, steps=steps)
        return pairs.render_all(pipe, self.cases if cases is None else cases, sampling, self.setup.placement)

    def built(self, folder: Path, *, same_files: bool = True) -> Built:
        """A merged repository, loaded and rendered as the recipe says."""
        return Built(folder, self.render(self.load(folder)), same_files)

    def judge(self, control: Control) -> Outcome:
        """Carry out a control and let all three gates look at it, also those that a run would not come to."""
        with tempfile.TemporaryDirectory(dir=self._work) as folder:
            built = control.build(self, Path(folder))
            problems = self._verify(built.folder) if built.same_files else self._differences(built.folder)
        beside = built.references or self.unfused
        rendered = pairs.pair_up(self.cases, built.pictures, beside)
        results = [judged.result for judged in case_judgement.judge_pairs(rendered, self.goldens, self.rules)]
        apart = [sentence for result in results for sentence in self._beyond_golden(result)]
        return Outcome(control, built.same_files, problems, results, apart, self.setup.dtype == "float32")

    def _verify(self, folder: Path) -> list[str]:
        """What stage `verify` would say; the LoRA is always the recipe's own file."""
        rows = None if self.params.verify.rows == "all" else self.params.verify.rows
        found = verify_merge(
            folder,
            self.base,
            self.plan().inputs,
            component=COMPONENT,
            rows=rows,
            expected=Expectation(self.setup.pipeline, self.setup.scheduler),
        )
        return found.problems

    def _differences(self, folder: Path) -> list[str]:
        ours, right = tensors(folder / COMPONENT), tensors(self.right / COMPONENT)
        return sorted(
            f"{name} is not that of the right merge"
            for name in ours.keys() | right.keys()
            if name not in ours
            or name not in right
            or ours[name].dtype != right[name].dtype
            or not torch.equal(ours[name], right[name])
        )

    def _beyond_golden(self, result: verdicts.CaseResult) -> list[str]:
        if result.vs_golden is None:
            return [f"{result.case.name} was not compared with its golden."]
        return verdicts.beyond(result.vs_golden, result.golden_limits, "the golden")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a component, whichever shard it is in."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}
