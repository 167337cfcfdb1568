"""LoRAs beside the base's weights instead of in them: the picture that a merged one is compared with.

diffusers attaches a LoRA itself where it can read it: other code than ours, from the file on. What it cannot read, or
has no notion of (modules left out, scales of their own), is attached here.
"""

from __future__ import annotations

import fnmatch
import inspect
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_fuse.checkpoint import repository_files
from lora_fuse.errors import RenderFailed
from lora_fuse.lora import Decomposed, Delta, LoraInput
from lora_fuse.machine import text
from lora_fuse.pictures.calls.call_arguments import call_of
from lora_fuse.pictures.environment import sealed
from lora_fuse.pictures.render import Pipeline
from lora_fuse.pictures.weights_in_place import loaded_names

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
    parts = {name: targets for name, targets in fused_parts(plan).items() if _is_there(pipe, name)}
    reason = _beyond_diffusers(plan) or _misread(pipe, plan)
    if reason is None:
        try:
            load_loras(pipe, plan.inputs, modules_of(parts), _routes(plan, parts))
            return Attached(DIFFUSERS)
        except RenderFailed as error:
            reason = str(error)
            pipe.unload_lora_weights()
    hooks = [hook for name, targets in parts.items() for hook in attach_differences(getattr(pipe, name), targets)]
    return Attached(f"lora-fuse, for {reason}", hooks)


def _is_there(pipe: Pipeline, component: str) -> bool:
    return hasattr(getattr(pipe, component, None), "parameters")


def _routes(plan: Plan, components: Iterable[str]) -> list[tuple[str, ...]] | None:
    """The components that each LoRA goes into, of these; None where there is one, the main one."""
    if not plan.further and plan.component in repository_files.MAIN:
        return None
    numbers = range(len(plan.inputs))
    return [tuple(name for name in components if name in plan.components_of(number)) for number in numbers]


def fused_parts(plan: Plan) -> dict[str, dict[str, Target]]:
    """The targets of a plan by the component of the pipeline that they are weights of."""
    return {part.component: part.targets for part in plan.parts}


def modules_of(parts: Mapping[str, Mapping[str, Target]]) -> int:
    """The modules of these components that each LoRA changes, summed over the LoRAs."""
    return sum(len(target.deltas) for targets in parts.values() for target in targets.values())


def _misread(pipe: Pipeline, plan: Plan) -> str | None:
    """The reason why diffusers would attach nothing, or another delta than the file has, where it is known to."""
    if others := fused_parts(plan).keys() - set(getattr(pipe, "_lora_loadable_modules", ())):
        return f"diffusers loads no LoRA into {', '.join(sorted(others))}"
    targets = {name: target for part in plan.parts for name, target in part.targets.items()}
    moved = [name for name, one in targets.items() if any(delta.placed.runs is not None for delta in one.deltas)]
    for pattern, reason in call_of(type(pipe).__name__).misread.items():
        if found := fnmatch.filter(moved, pattern):
            return f"diffusers misreads {found[0]} ({reason})"
    return None


def _beyond_diffusers(plan: Plan) -> str | None:
    if not plan.selection.everything:
        return "the recipe leaves modules out or scales them"
    if places := {place for lora in plan.loras for place in lora.expressions}:
        return f"diffusers would match the patterns in {', '.join(sorted(places))} without an end"
    if others := {delta.algorithm for lora in plan.loras for delta in lora.deltas if not delta.is_plain}:
        return f"diffusers does not read {', '.join(sorted(others))}"
    if unread := {delta.said_by for lora in plan.loras for delta in lora.deltas} - READ_BY_DIFFUSERS:
        return f"diffusers does not read the strength in {', '.join(sorted(unread))}"
    return None


@sealed()
def load_loras(
    pipe: Pipeline, loras: Sequence[LoraInput], expected_modules: int, routes: Sequence[Sequence[str]] | None = None
) -> int:
    """Attach LoRAs, unfused, and check that they arrived: diffusers may load no layer at all and only warn.

    They act together, each at its scale. `expected_modules` are those of the base that each LoRA targets, summed over
    the LoRAs; so many were given an adapter, and that number is returned. `routes` are the components that each LoRA
    goes into; without them, it is the pipeline's denoiser.

    Raises:
        RenderFailed: diffusers cannot read a file, or attached another number of modules.
    """
    adapters = [f"lora_{number}" for number in range(len(loras))]  # torch forbids dots, which names may have
    for number, (lora, adapter) in enumerate(zip(loras, adapters, strict=True)):
        _load_lora(pipe, lora, adapter, None if routes is None else routes[number])
    components = {name for route in routes or [call_of(type(pipe).__name__).denoisers[:1]] for name in route}
    factors = [getattr(module, "lora_A", {}) for name in components for module in getattr(pipe, name).modules()]
    attached = sum(adapter in factor for adapter in adapters for factor in factors)
    if attached != expected_modules:
        names = ", ".join(lora.name for lora in loras)
        raise RenderFailed(
            f"diffusers attached {attached} of {expected_modules} LoRA modules ({names}): pictures would show "
            "another LoRA; convert the keys to the form transformer.X.lora_A.weight"
        )
    here = [number for number in range(len(loras)) if routes is None or routes[number]]
    pipe.set_adapters([adapters[number] for number in here], [loras[number].scale for number in here])
    return attached


def _load_lora(pipe: Pipeline, lora: LoraInput, adapter: str, route: Sequence[str] | None) -> None:
    at = {"weight_name": lora.path.name, "local_files_only": True}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # a second LoRA is what is meant
            if route is None:
                pipe.load_lora_weights(lora.path.parent, adapter_name=adapter, **at)
            elif route:
                _load_into(pipe, lora.path.parent, adapter, route, at)
    except (OSError, ValueError, LookupError, RuntimeError, AttributeError, TypeError) as error:
        raise RenderFailed(f"diffusers cannot load LoRA {lora.name} ({lora.path}): {text.one_line(error)}") from error


def _load_into(pipe: Pipeline, folder: Path, adapter: str, route: Sequence[str], at: Mapping[str, Any]) -> None:
    """Load a file as diffusers does, into these components alone: others may be absent, or have LoRAs of their own."""
    unet = {"unet_config": pipe.unet.config} if hasattr(pipe, "unet") else {}
    state, *alphas, metadata = pipe.lora_state_dict(folder, return_lora_metadata=True, **at, **unet)
    for name in route:
        encodes = name.startswith("text_encoder")
        slot = "text_encoder" if encodes else name.partition("_")[0]
        load = getattr(pipe, f"load_lora_into_{slot}")
        own = {key: value for key, value in state.items() if key.startswith(f"{name}.")}
        renamed = {f"{slot}.{key.partition('.')[2]}": value for key, value in own.items()} if not encodes else own
        given = {slot: getattr(pipe, name), "adapter_name": adapter, "metadata": metadata, "_pipeline": pipe}
        given |= {"prefix": name} if encodes else {}
        given |= {"network_alphas": alphas[0]} if alphas else {"network_alphas": None}
        known = inspect.signature(load).parameters
        load(renamed or state, **{key: value for key, value in given.items() if key in known})


def attach_differences(model: torch.nn.Module, targets: Mapping[str, Target]) -> list[RemovableHandle]:
    """Add to what a module gives what it would give with the difference in the place of its parameters.

    Of a module that is linear in them that is what the sum of both would give; the difference has the precision of the
    pictures, and is not rounded to the base's. Any other, a block with a modulation of its own or a norm that adds 1 to
    its weight, has the sum as its parameters while it runs.
    """
    modules: dict[str, dict[str, Target]] = defaultdict(dict)
    for name, target in loaded_names(model, targets).items():
        module, _, parameter = name.rpartition(".")
        modules[module][parameter] = target
    handles: list[RemovableHandle] = []
    for name, found in modules.items():
        part = model.get_submodule(name)
        if _is_linear(part):
            handles.append(part.register_forward_hook(_Beside(found), with_kwargs=True))
            continue
        inside = _Inside(found)
        handles.append(part.register_forward_pre_hook(inside.put))
        handles.append(part.register_forward_hook(inside.take_back, always_call=True))
    return handles


def _is_linear(module: torch.nn.Module) -> bool:
    """True for a module that is known to be linear in its parameters."""
    import torch
    from diffusers.models.normalization import RMSNorm

    layers = (torch.nn.Linear, torch.nn.modules.conv._ConvNd, torch.nn.Embedding)
    return isinstance(module, (*layers, torch.nn.LayerNorm, torch.nn.GroupNorm, torch.nn.RMSNorm, RMSNorm))


class _Inside:
    """Two forward hooks, between which a module's parameters are their sums with deltas."""

    def __init__(self, targets: Mapping[str, Target]) -> None:
        from lora_fuse.fusion import read_deltas

        self._differences = {name: read_deltas(target) for name, target in targets.items()}
        self._own: dict[str, torch.nn.Parameter | None] = {}

    def put(self, module: torch.nn.Module, _: Any) -> None:
        """Put the sums in the parameters' place, in their dtype."""
        import torch

        for name, deltas in self._differences.items():
            own = module.get_parameter(name)
            self._own[name] = own
            changed = own.detach().double() + _as_parameter(own.double(), deltas)
            module._parameters[name] = torch.nn.Parameter(changed.to(own), requires_grad=False)

    def take_back(self, module: torch.nn.Module, *_: Any) -> None:
        """Put the module's own parameters back, also after an error."""
        module._parameters.update(self._own)


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
