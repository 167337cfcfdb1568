"""The device that a fuse runs on.

torch is imported inside the functions: naming a device must not cost a second of start-up.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

from lora_fuse.errors import NoDevice, naming_extras

DEVICES = ("auto", "cpu", "cuda")
ENOUGH = 8  # cores


def resolve_device(requested: str) -> str:
    """The device to use, "cpu" or "cuda": as requested, or for "auto" the GPU where there is one.

    Raises:
        NoDevice: no such device is known, or cuda was asked for and torch finds none.
        MissingExtra: cuda was asked for and torch is not installed.
    """
    if requested not in DEVICES:
        raise NoDevice(f"unknown device {requested!r}: use one of {', '.join(DEVICES)}")
    if requested == "cpu" or (requested == "auto" and _has_no_gpu()):
        return "cpu"
    with naming_extras("device cuda"):
        import torch

    present = torch.cuda.is_available()
    if requested == "cuda" and not present:
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise NoDevice(
            f"device cuda was asked for and torch {torch.__version__} ({built}) finds no GPU: use device auto or cpu, "
            "or install a CUDA build of torch beside a working driver"
        )
    return "cuda" if present else "cpu"


def fuse_device(requested: str, plain: bool) -> str:
    """The device to fuse on, as `resolve_device`; but from `ENOUGH` cores on, "auto" makes a `Plan.plain` on the CPU.

    There hashing takes longer than adding, and a GPU would only add the seconds that torch and CUDA take to start
    (docs/performance.md).
    """
    if requested == "auto" and plain and (os.cpu_count() or 1) >= ENOUGH:
        return "cpu"
    return resolve_device(requested)


def _has_no_gpu() -> bool:
    """Say no GPU can be used where a look at the machine is enough to know: importing torch to ask takes seconds."""
    nodes = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")  # NVIDIA, NVIDIA under WSL, AMD
    no_driver = sys.platform == "linux" and not any(Path(node).exists() for node in nodes)
    return no_driver or find_spec("torch") is None
