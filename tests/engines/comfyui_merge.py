"""A merge by ComfyUI: ``python -m tests.engines.comfyui_merge FOLDER DEVICE BASE OUT LORA SCALE [LORA SCALE...]``.

In a process of its own, as it reads a command line. The LoRAs go through `load_lora` and `ModelPatcher`, as those of
the nodes "Load LoRA" and "Save Model" do, into a module that has the file's weights.
"""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from tests.engines.comfyui import ABSENT, StandIn

if TYPE_CHECKING:
    import torch


def main() -> None:
    """Merge, and write the module's weights."""
    folder, device, base, out, *given = sys.argv[1:]
    sys.path.insert(0, folder)
    sys.argv = [sys.argv[0], *(["--cpu"] if device == "cpu" else [])]
    sys.meta_path.append(StandIn([name for name in ABSENT if find_spec(name) is None]))
    import torch
    from comfy import options

    options.enable_args_parsing()
    from comfy import lora, model_patcher
    from safetensors.torch import load_file, save_file

    model = torch.nn.Module()
    weights = load_file(base)
    for name, values in weights.items():
        module, _, parameter = name.rpartition(".")
        _made(model, module).register_parameter(parameter, torch.nn.Parameter(values, requires_grad=False))
    patcher = model_patcher.ModelPatcher(model, torch.device(device), torch.device("cpu"))
    keys = {name.removesuffix(".weight"): name for name in weights}
    for file, scale in zip(given[::2], given[1::2], strict=True):
        patcher.add_patches(lora.load_lora(load_file(file), keys), float(scale))
    for name in list(patcher.patches):
        patcher.patch_weight_to_device(name, torch.device(device))
    save_file({name: values.cpu().contiguous() for name, values in model.state_dict().items()}, Path(out))


def _made(model: "torch.nn.Module", name: str) -> "torch.nn.Module":
    """A module below the model by its dotted name, made with those on the way where it is not there."""
    for part in name.split("."):
        if not hasattr(model, part):
            model.add_module(part, type(model)())
        model = model.get_submodule(part)
    return model


if __name__ == "__main__":
    main()
