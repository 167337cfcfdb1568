"""One denoiser call of ComfyUI: ``python comfyui.py FOLDER MODEL IN OUT``, in a process of its own.

Its log, on stderr, names missing and unexpected tensors; there is no other sign of a file that is misread.
"""

import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

ABSENT = ("torchaudio", "torchvision")


class StandIn(MetaPathFinder, Loader):
    """Modules in the place of libraries that other models' code imports, and Qwen-Image's never calls."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def find_spec(self, fullname: str, *_: object) -> ModuleSpec | None:
        is_absent = fullname.partition(".")[0] in self.names
        return ModuleSpec(fullname, self, is_package=True) if is_absent else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        class Anything(ModuleType):
            def __getattr__(self, name: str) -> Any:
                if name.startswith("__"):
                    raise AttributeError(name)
                return MagicMock()

        return Anything(spec.name)

    def exec_module(self, module: ModuleType) -> None: ...


def main() -> None:
    """Load a file as the node "Load Diffusion Model" does, and answer."""
    folder, file, given, answer = sys.argv[1:]
    sys.path.insert(0, folder)
    sys.argv = [sys.argv[0], "--cpu"]
    sys.meta_path.append(StandIn([name for name in ABSENT if find_spec(name) is None]))
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    import torch
    from comfy import options

    options.enable_args_parsing()
    from comfy import model_management, sd

    options_of_model: dict[str, Any] = {"dtype": torch.float32}
    if file.endswith(".gguf"):
        tensors, operations = _read_gguf(Path(folder), file)
        options_of_model |= {"custom_operations": operations}
        patcher = sd.load_diffusion_model_state_dict(tensors, model_options=options_of_model)
    else:
        patcher = sd.load_diffusion_model(file, model_options=options_of_model)
    model_management.load_models_gpu([patcher])
    call = torch.load(given, weights_only=True)
    picture, *inputs = [latents[None, :, None] for latents in call["latents"]]
    with torch.no_grad():
        model = patcher.model.diffusion_model
        step = torch.tensor([call["sigma"]])
        text = call["text"][None]
        found = model(picture, step, text, None, ref_latents=inputs or None, transformer_options={})
    torch.save(found[0, :, 0].float(), answer)


def _read_gguf(folder: Path, file: str) -> tuple[Any, Any]:
    """Tensors and operations of ComfyUI-GGUF's node "Unet Loader (GGUF)", without its nodes."""
    package = ModuleType("comfyui_gguf")
    package.__path__ = [str(folder / "custom_nodes/ComfyUI-GGUF")]
    sys.modules["comfyui_gguf"] = package
    loader = import_module("comfyui_gguf.loader")
    return loader.gguf_sd_loader(file), import_module("comfyui_gguf.ops").GGMLOps()


if __name__ == "__main__":
    main()
