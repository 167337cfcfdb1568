"""LoRAs beside the base's weights instead of in them: the picture that a merged one is compared with.

diffusers attaches a LoRA itself where it can read it: other code than ours, from the file on. What it cannot read, or
has no notion of (modules left out, scales of their own), is attached here.
"""

from __future__ import annotations

import fnmatch
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_fuse.checkpoint import repository_files
from lora_fuse.errors import RenderFailed
from lora_fuse.lora import Decomposed, Delta, LoraInput
from lora_fuse.pictures.calls.call_arguments import call_of
from lora_fuse.pictures.environment import sealed
from lora_fuse.pictures.render import Pipeline, one_line

if TYPE_CHECKING:
    import torch
    from torch.utils.hooks import RemovableHandle

    from lora_fuse.fusion import Plan, Target

DIFFUSERS = "diffusers"
# The places of a LoRA's strength that diffusers reads, as `lora_fuse.lora.LoraDelta.said_by` names them.
READ_BY_DIFFUSERS = {".alpha", "nowhere: alpha = rank", "header lora_adapter_metadata (transformer)"}


@dataclass(frozen=True, slots=True)
class Attached:
    """LoRAs that act in a pipeline; `by` is `DIFFUSERS`, or says why they were attached here."""

    by: str
    hooks: Sequence[RemovableHandle] = ()

    def detach(self, pipe: Pipeline) -> None:
        """Take them off: the pipeline is the base's again, with the weights that it has."""
        for hook in self.hooks:
            hook.remove()
        pipe.unload_lora_weights()


def attach(pipe: Pipeline, plan: Plan) -> Attached:
    """Let the LoRAs of a plan act in a pipeline of its base, in the components that are there."""
    parts = {name: targets for name, targets in fused_parts(plan).items() if getattr(pipe, name, None) is not None}
    reason = _beyond_diffusers(plan) or _misread(pipe, plan)
    if reason is None:
        try:
            load_loras(pipe, plan.inputs, modules_of(plan), tuple(parts))
            return Attached(DIFFUSERS)
        except RenderFailed as error:
            reason = str(error)
            pipe.unload_lora_weights()
    hooks = [hook for name, targets in parts.items() for hook in attach_differences(getattr(pipe, name), targets)]
    return Attached(f"lora-fuse, for {reason}", hooks)


def fused_parts(plan: Plan) -> dict[str, dict[str, Target]]:
    """The targets of a plan by the component of the pipeline that they are weights of."""
    return {part.component: part.targets for part in plan.parts}


def modules_of(plan: Plan) -> int:
    """The modules of the base that each LoRA of a plan changes, summed over the LoRAs."""
    return sum(len(target.deltas) for part in plan.parts for target in part.targets.values())


def _misread(pipe: Pipeline, plan: Plan) -> str | None:
    """The reason why diffusers would attach another delta than the file has, where it is known to."""
    for pattern, reason in call_of(type(pipe).__name__).misread.items():
        if found := fnmatch.filter([name for part in plan.parts for name in part.targets], pattern):
            return f"diffusers misreads {found[0]} ({reason})"
    return None


def _beyond_diffusers(plan: Plan) -> str | None:
    if not plan.selection.everything:
        return "the recipe leaves modules out or scales them"
    if plan.further or plan.component not in repository_files.MAIN:
        return f"diffusers loads a file into one component, and these are for {', '.join(fused_parts(plan))}"
    if places := {place for lora in plan.loras for place in lora.expressions}:
        return f"diffusers would match the patterns in {', '.join(sorted(places))} without an end"
    if others := {delta.algorithm for lora in plan.loras for delta in lora.deltas if not delta.is_plain}:
        return f"diffusers does not read {', '.join(sorted(others))}"
    if unread := {delta.said_by for lora in plan.loras for delta in lora.deltas} - READ_BY_DIFFUSERS:
        return f"diffusers does not read the strength in {', '.join(sorted(unread))}"
    return None


@sealed()
def load_loras(
    pipe: Pipeline, loras: Sequence[LoraInput], expected_modules: int, components: Sequence[str] = ("transformer",)
) -> int:
    """Attach LoRAs, unfused, and check that they arrived: diffusers may load no layer at all and only warn.

    They act together, each at its scale. `expected_modules` are those of the base that each LoRA targets, summed over
    the LoRAs; so many of the components' were given an adapter, and that number is returned.

    Raises:
        RenderFailed: diffusers cannot read a file, or attached another number of modules.
    """
    adapters = [f"lora_{number}" for number in range(len(loras))]  # torch forbids dots, which names may have
    for lora, adapter in zip(loras, adapters, strict=True):
        _load_lora(pipe, lora, adapter)
    factors = [getattr(module, "lora_A", {}) for name in components for module in getattr(pipe, name).modules()]
    attached = sum(adapter in factor for adapter in adapters for factor in factors)
    if attached != expected_modules:
        names = ", ".join(lora.name for lora in loras)
        raise RenderFailed(
            f"diffusers attached {attached} of {expected_modules} LoRA modules ({names}): pictures would show "
            "another LoRA; convert the keys to the form transformer.X.lora_A.weight"
        )
    pipe.set_adapters(adapters, [lora.scale for lora in loras])
    return attached


def _load_lora(pipe: Pipeline, lora: LoraInput, adapter: str) -> None:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # a second LoRA is what is meant
            pipe.load_lora_weights(
                lora.path.parent, weight_name=lora.path.name, adapter_name=adapter, local_files_only=True
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise RenderFailed(f"diffusers cannot load LoRA {lora.name} ({lora.path}): {one_line(error)}") from error


def attach_differences(model: torch.nn.Module, targets: Mapping[str, Target]) -> list[RemovableHandle]:
    """Add to what a module gives what it would give with the difference in the place of its parameters.

    Every module that has targets is linear in its parameters, so that is what the sum of both would give; the
    difference has the precision of the pictures, and is not rounded to the base's.
    """
    modules: dict[str, dict[str, Target]] = defaultdict(dict)
    for name, target in targets.items():
        module, _, parameter = name.rpartition(".")
        modules[module][parameter] = target
    return [
        model.get_submodule(name).register_forward_hook(_Beside(found), with_kwargs=True)
        for name, found in modules.items()
    ]


class _Beside:
    """A forward hook that adds the output of the same module with its deltas as parameters."""

    def __init__(self, targets: Mapping[str, Target]) -> None:
        from lora_fuse.fusion import read_deltas  # numba's import takes a second

        self._differences = {name: read_deltas(target) for name, target in targets.items()}
        self._inside = False

    def __call__(self, module: torch.nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> torch.Tensor | None:
        if self._inside:
            return None
        import torch

        self._inside = True
        try:
            parameters = {
                name: _as_parameter(parameter, self._differences.get(name, ()))
                for name, parameter in module.named_parameters(recurse=False)
            }
            added: torch.Tensor = torch.func.functional_call(module, parameters, args, kwargs)
        finally:
            self._inside = False
        return output + added


def _as_parameter(parameter: torch.Tensor, deltas: Sequence[Delta]) -> torch.Tensor:
    import torch

    on_cpu = any(isinstance(one, Decomposed) for one in deltas)
    weight = parameter.detach().to("cpu" if on_cpu else parameter.device, torch.float64)
    weight = weight.reshape(len(weight), -1)
    total = torch.zeros_like(weight)
    for one in deltas:
        one.add_to(total, weight, 0, 0)
    return total.view(parameter.shape).to(parameter)
