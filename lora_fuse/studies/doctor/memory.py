"""Checks that a pipeline's weights fit the memory of the machine and of its GPUs; pictures take some on top of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_fuse.checkpoint import dtypes, read_header
from lora_fuse.hub import sizes
from lora_fuse.machine import progress
from lora_fuse.studies.doctor.finding import Finding, fail, ok, warn

BETTER = ("cuda", "balanced", "model_offload", "group_offload", "cpu")  # placements, the fastest first


def weights(source: sizes.SourceSize, dtype: str) -> tuple[dict[str, int], bool]:
    """Bytes in memory of each component's weights, and True if that is exact.

    The headers of files that are here tell; other files are taken to be stored in the dtype of the pictures.
    """
    exact = not any(name in source.missing for names in source.weights.values() for name in names)
    nbytes = {known.array_name: known.bits // 8 for known in dtypes.DTYPES.values()}

    def size(name: str) -> int:
        return _in_memory(source.root / name, nbytes[dtype]) if exact else source.sizes[name]

    return {part: sum(map(size, names)) for part, names in source.weights.items()}, exact


def _in_memory(path: Path, size: int) -> int:
    total = 0
    for tensor in read_header(path).tensors.values():
        stored = dtypes.DTYPES[tensor.dtype]
        total += tensor.nbytes * 8 // stored.bits * size if stored.is_float else tensor.nbytes
    return total


def together(parts: Mapping[str, int]) -> int:
    """Bytes of weights that are in memory at once: text encoders have gone when what denoises comes."""
    encoders = sum(size for part, size in parts.items() if part.startswith("text_encoder"))
    return max(encoders, sum(parts.values()) - encoders)


def fits(placement: str, parts: Mapping[str, int], gpus: Sequence[int]) -> bool:
    """True if weights fit GPUs of so many free bytes."""
    if placement == "cpu" or not gpus:
        return placement == "cpu"
    total = together(parts)
    needs = {"cuda": total, "balanced": total, "model_offload": max(parts.values(), default=0), "group_offload": 0}
    return needs[placement] <= (sum(gpus) if placement == "balanced" else gpus[0])


def gpu(placement: str, parts: Mapping[str, int], gpus: Sequence[int], dtype: str) -> Finding:
    """Check that a placement fits the GPUs: `parts` are bytes of weights by component, `gpus` free bytes."""
    if placement == "cpu":
        there = f"{len(gpus)} here, not used" if gpus else "none here"
        return ok("GPU", f"{there}: regress.placement is cpu")
    free = " + ".join(map(progress.human_bytes, gpus))
    if not parts and gpus:
        return warn("GPU", f"{free} free", "", "what is needed is not known, as the base's size is unknown")
    name, largest = max(parts.items(), key=lambda part: part[1], default=("", 0))
    needed = {
        "model_offload": f"{progress.human_bytes(largest)} ({name}, the largest part, in {dtype})",
        "group_offload": "a GPU, for a layer at a time",
    }.get(placement, f"{progress.human_bytes(together(parts))} (transformer and VAE in {dtype})")
    needed = needed if parts else "a GPU, of a size that is not known yet,"
    if fits(placement, parts, gpus):
        return ok("GPU", f"{free} free", f"{needed} and room for the pictures with regress.placement {placement}")
    best = next(one for one in BETTER if fits(one, parts, gpus) and (one != "balanced" or len(gpus) > 1))
    needed = f"{needed} with regress.placement {placement}"
    remedy = f"set regress.placement={best}"
    if not gpus:
        return fail("GPU", "torch finds none", needed, f"{remedy}, or install a CUDA build of torch and a driver")
    return fail("GPU", f"{free} free", needed, remedy)


def ram(placement: str, parts: Mapping[str, int], total: int, available: int, dtype: str) -> Finding:
    """Check that a pipeline can be loaded: but for `cuda`, a placement begins with it in the machine's memory.

    `parts` are bytes of weights by component, `total` and `available` bytes of memory for processes here.
    """
    need = together(parts)
    found = f"{progress.human_bytes(available)} of {progress.human_bytes(total)} free"
    if placement == "cuda":
        return ok("memory", found, "none for weights, which go from the files to the GPU")
    needed = f"{progress.human_bytes(need)} (transformer and VAE in {dtype})"
    if need > total:
        return fail("memory", found, needed, "use a larger machine; fuse and verify need no more than 1GB")
    if need > available:
        return warn("memory", found, needed, "end other programs before regress")
    return ok("memory", found, needed)


def memory() -> tuple[int, int]:
    """Bytes of memory that processes here may have in all, and that are free; a container has less than its host."""
    import psutil

    host = psutil.virtual_memory()
    total = host.total
    available = host.available
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            allowed, taken = (int(Path(path).read_text(encoding="ascii")) for path in (limit, used))
        except (OSError, ValueError):  # no such control group, or "max"
            continue
        total = min(total, allowed)
        available = min(available, max(allowed - taken, 0))
    return total, available


def gpu_memory() -> list[int]:
    """Free bytes of every GPU that torch finds."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.cuda.mem_get_info(number)[0] for number in range(count)]
