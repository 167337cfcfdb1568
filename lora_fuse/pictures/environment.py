"""The environment that pictures are made in: described, made deterministic, sealed, named by the key of its goldens.

torch is imported inside the functions: what it reads from the environment has to be set before.
"""

from __future__ import annotations

import gc
import os
import platform
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from lora_fuse.errors import NoDevice
from lora_fuse.hub import client

# Read when CUDA starts, and when torch, MKL and oneDNN choose their kernels. Every x86 processor of the last ten years
# has AVX2: pinned to it, and MKL to the code that all of them share, machines differ less; it costs no time here.
_CUDA_PINS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
_OF_X86 = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "AVX2"}
CPU_PINS = _OF_X86 if platform.machine().lower() in {"x86_64", "amd64"} else {}

FLASH_FROM = (8, 0)  # compute capability of the first GPUs that torch's flash attention runs on

FLAGS = {
    "generator": "cpu",
    "deterministic_algorithms": "on",
    "cudnn_benchmark": "off",
    "tf32": "off",
    "sdpa_backend": "flash, else memory-efficient on CUDA, else math",
}
# Of goldens from before that wording: on the CPU nothing else was meant.
_SAME_ON_CPU = {"memory-efficient on CUDA, flash on the CPU, else math": FLAGS["sdpa_backend"]}


@dataclass(frozen=True, slots=True)
class Key:
    """The name that goldens are filed under: pictures of one key are compared, others can only be looked at.

    `device` is "cpu" or "cuda"; `isa` the CUDA compute capability ("sm90"), on the CPU architecture and instruction set
    ("x86_64-avx2"); `threads` are torch's intra-op threads on the CPU, and 0 on CUDA, where they move nothing; `dtype`
    is torch's name of the one that the weights were loaded in; the versions are major and minor. `attention` is the
    backend of the transformer's on CUDA, empty for the memory-efficient one (in float32, on old GPUs, and of all
    goldens before there was another); `compiled` that its blocks were compiled.
    """

    device: str
    isa: str
    threads: int
    dtype: str
    torch: str
    diffusers: str
    attention: str = ""
    compiled: bool = False

    def __str__(self) -> str:
        """The folder's name: ``cpu-x86_64-avx2-2threads-float32-torch2.13-diffusers0.42``."""
        threads = f"{self.threads}threads" if self.threads else ""
        kernels = [self.device, self.isa, threads, self.dtype, self.attention, "compiled" if self.compiled else ""]
        return "-".join([*filter(None, kernels), f"torch{self.torch}", f"diffusers{self.diffusers}"])

    def differences(self, other: Key) -> list[str]:
        """List the parts that differ in `other`, as "torch 2.13, there 2.12"."""
        return [
            f"{name} {_shown(getattr(self, name))}, there {_shown(getattr(other, name))}"
            for name in self.__dataclass_fields__
            if getattr(self, name) != getattr(other, name)
        ]

    def nearest(self, others: Iterable[Key]) -> Key | None:
        """The key that differs in the fewest parts, of the same device and dtype; another dtype is another picture."""
        kin = [other for other in others if (other.device, other.dtype) == (self.device, self.dtype)]
        return min(kin, key=lambda other: (len(self.differences(other)), str(other)), default=None)


@dataclass(frozen=True, slots=True)
class Environment:
    """Everything that the pixels of a picture depend on besides weights, case and sampling; no host name, no clock.

    `device_name` is the GPU's product name, or the processor's architecture; `driver` is NVIDIA's, `cuda` what torch
    was built for; both None on the CPU. Versions are whole, with their build ("2.13.0+cpu").
    """

    key: Key
    device_name: str
    driver: str | None
    cuda: str | None
    torch: str
    diffusers: str
    transformers: str
    python: str
    placement: str
    flags: dict[str, str]

    @property
    def meant(self) -> dict[str, str]:
        """The flags, in the words of today where older ones mean the same on this device."""
        same = _SAME_ON_CPU if self.key.device == "cpu" else {}
        return {name: same.get(value, value) for name, value in self.flags.items()}


def _shown(value: object) -> str:
    return "memory-efficient" if value == "" else str(value)


def make_deterministic(threads: int | None = None) -> None:
    """Let the same seed give the same picture twice; call it before torch has done any work in the process.

    Kernels without a deterministic form raise instead of varying. TF32 and autotuning are off. Attention is flash
    attention, deterministic and the fastest that is, on a GPU as on the CPU; what it cannot do (float32 and heads of
    more than 256 on a GPU, masks) falls to the memory-efficient one, which is a GPU's, and that to plain arithmetic.
    cuDNN's is off: torch refuses it where algorithms have to be deterministic. Memory that nobody has written is left
    as it is: to fill it first costs time and changes nothing that a kernel is allowed to read.
    `threads` are intra-op threads; None leaves torch's choice, the number of cores.
    Source: https://docs.pytorch.org/docs/stable/notes/randomness.html
    """
    for name, value in (_CUDA_PINS | CPU_PINS).items():
        os.environ.setdefault(name, value)
    with uncollected("torch"):
        import torch
        import torch.utils.deterministic

        torch.use_deterministic_algorithms(True)  # it imports torch's compiler
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    if threads is not None:
        torch.set_num_threads(threads)
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.enable_mem_efficient_sdp(True)
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_math_sdp(True)


@contextmanager
def uncollected(library: str) -> Iterator[None]:
    """Import a large library within: the garbage collector rests, and never looks at what is there at the end.

    An import makes much and drops little of it, and every so many objects all would be looked at again: a fifth of the
    time. Where the library is loaded already nothing is done, since what is there may have to go.
    """
    if library in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def sealed() -> Iterator[None]:
    """Shut in the libraries that load and run a base: no network, no token, and nobody on stdin to ask.

    Whatever loads or renders does so within; a base that is trusted too much finds nothing to take and nowhere to go.
    """
    with client.cut_off(), _at_end_of_stdin():
        yield


@contextmanager
def _at_end_of_stdin() -> Iterator[None]:
    """Let whoever reads from stdin, here or in a process that is started, find its end."""
    theirs = sys.stdin
    with Path(os.devnull).open(encoding="utf-8") as nothing:  # descriptor 0 itself, where that is closed
        kept = os.dup(0)
        try:
            os.dup2(nothing.fileno(), 0)
            sys.stdin = nothing
            yield
        finally:
            sys.stdin = theirs
            os.dup2(kept, 0)
            os.close(kept)


def check_gpu(placement: str) -> None:
    """Refuse a placement that needs a GPU where there is none.

    Raises:
        NoDevice: torch finds no GPU.
    """
    if placement == "cpu":
        return
    import torch

    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        among = f" among CUDA_VISIBLE_DEVICES={visible}" if visible is not None else ""
        raise NoDevice(
            f"regress.placement {placement} needs a GPU and torch {torch.__version__} ({built}) finds none{among}: set "
            "regress.placement to cpu, install a CUDA build of torch beside a working driver, or start no more "
            "processes than there are GPUs"
        )


def environment(placement: str, dtype: str, *, compiled: bool = False) -> Environment:
    """Describe where pictures are made; `dtype` is that of the weights in memory, `compiled` as in `Key`.

    Raises:
        NoDevice: see `check_gpu`.
    """
    check_gpu(placement)
    import torch

    device = "cpu" if placement == "cpu" else "cuda"
    versions = {name: version(name) for name in ("diffusers", "transformers")}
    torch_version = str(torch.__version__)
    attention = ""
    if device == "cuda":
        capability = torch.cuda.get_device_capability()
        isa = "sm{}{}".format(*capability)
        name = torch.cuda.get_device_name()
        threads = 0
        attention = "flash" if capability >= FLASH_FROM and dtype != "float32" else ""
    else:
        name = platform.machine()
        threads = torch.get_num_threads()
        isa = f"{name}-{torch.backends.cpu.get_cpu_capability().lower()}"
    minor = (_minor(torch_version), _minor(versions["diffusers"]))
    key = Key(device, isa, threads, dtype, *minor, attention, compiled)
    flags = FLAGS | {pin: os.environ[pin] for pin in sorted(_CUDA_PINS | _OF_X86) if pin in os.environ}
    if compiled:
        flags["compiled"] = "the transformer's blocks"
    return Environment(
        key=key,
        device_name=name,
        driver=_driver() if device == "cuda" else None,
        cuda=torch.version.cuda if device == "cuda" else None,
        torch=torch_version,
        python="{}.{}".format(*sys.version_info[:2]),
        placement=placement,
        flags=flags,
        **versions,
    )


def _driver() -> str | None:
    """Version of NVIDIA's driver, from its kernel module."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text(encoding="ascii").split()
    except OSError:
        return None
    return next((word for word in words if word[:1].isdigit() and "." in word), None)


def _minor(number: str) -> str:
    return ".".join(number.split(".")[:2])
