"""Which device runs the pictures, how it is made to give the same bits twice, and what a picture depends on.

torch is imported inside the functions: naming a device must not cost a second of start-up.
"""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from lora_fuse.errors import NoDevice

DEVICES = ("auto", "cpu", "cuda")
ENOUGH = 8  # cores


@dataclass(frozen=True, slots=True)
class Environment:
    """What the pixels of a picture depend on besides weights, case and sampling.

    Attributes:
        device: "cpu" or "cuda".
        dtype: torch's name of the dtype that the weights were loaded in.
        device_name: the GPU's product name; on the CPU its architecture and the instruction set that torch uses.
        capability: CUDA compute capability without the dot, "90" for 9.0; None on the CPU.
        threads: intra-op threads of torch; they may move a float32 picture by one level of 255.
        torch: version, with its build ("2.13.0+cpu").
        diffusers: version.
        transformers: version.
    """

    device: str
    dtype: str
    device_name: str
    capability: str | None
    threads: int
    torch: str
    diffusers: str
    transformers: str

    @property
    def key(self) -> str:
        """Goldens are shared by runs of equal key: "cpu-float32", "cuda-sm90-bfloat16"."""
        where = self.device if self.capability is None else f"{self.device}-sm{self.capability}"
        return f"{where}-{self.dtype}"


def resolve_device(requested: str) -> str:
    """The device to use, "cpu" or "cuda": as requested, or for "auto" the GPU where there is one.

    Raises:
        NoDevice: no such device is known, or cuda was asked for and torch finds none.
    """
    if requested not in DEVICES:
        raise NoDevice(f"unknown device {requested!r}: use one of {', '.join(DEVICES)}")
    if requested == "cpu" or (requested == "auto" and _has_no_gpu()):
        return "cpu"
    import torch

    present = torch.cuda.is_available()
    if requested == "cuda" and not present:
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise NoDevice(
            f"device cuda was asked for and torch {torch.__version__} ({built}) finds no GPU: use device auto or cpu, "
            "or install a CUDA build of torch beside a working driver"
        )
    if requested == "auto":
        return "cuda" if present else "cpu"
    return requested


def fuse_device(requested: str, plain: bool) -> str:
    """The device to fuse on, as `resolve_device`; but from `ENOUGH` cores on, "auto" adds `plain` LoRAs on the CPU.

    There hashing takes longer than adding, and a GPU would only add the seconds that torch and CUDA take to start
    (docs/performance.md).

    Args:
        requested: "auto", "cpu" or "cuda".
        plain: whether all that is added are plain LoRAs, to weights of 16 bits.

    Raises:
        NoDevice: see `resolve_device`.
    """
    if requested == "auto" and plain and (os.cpu_count() or 1) >= ENOUGH:
        return "cpu"
    return resolve_device(requested)


def _has_no_gpu() -> bool:
    """Whether a look at the machine is enough to know: importing torch to ask takes seconds."""
    nodes = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")  # NVIDIA, NVIDIA under WSL, AMD
    return sys.platform == "linux" and not any(Path(node).exists() for node in nodes)


def make_deterministic() -> None:
    """The same seed gives the same picture twice; call it before the first CUDA work of the process.

    Kernels without a deterministic form raise instead of varying. On CUDA one attention backend is pinned, the
    memory-efficient one, which every CUDA build has and which takes masks; TF32 and autotuning are off. The CPU has
    its own flash attention behind the same switch, deterministic and several times faster than the one without, so
    there the switch stays on.
    Source: https://docs.pytorch.org/docs/stable/notes/randomness.html
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, when CUDA starts
    import torch

    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    if torch.cuda.is_available():
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)


def environment(device: str, dtype: str) -> Environment:
    """Describe a resolved device and the libraries; host names and clock times stay out."""
    import torch

    name, capability = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}", None
    if device == "cuda":
        name = torch.cuda.get_device_name()
        capability = "{}{}".format(*torch.cuda.get_device_capability())
    return Environment(
        device=device,
        dtype=dtype,
        device_name=name,
        capability=capability,
        threads=torch.get_num_threads(),
        torch=str(torch.__version__),
        diffusers=version("diffusers"),
        transformers=version("transformers"),
    )
