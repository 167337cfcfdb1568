"""Any delta added to weights of any dtype by torch, on the CPU or on a GPU."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from lora_fuse.checkpoint import dtypes
from lora_fuse.fusion.torch_sums import fuse_rows
from lora_fuse.lora import Decomposed, Delta

_of_thread = threading.local()


class TorchSum:
    """The deltas of one weight."""

    def __init__(self, deltas: Sequence[Delta], dtype: str, columns: int, device: str) -> None:
        """Differences of a weight of a safetensors dtype; a square root is taken on the CPU, the same everywhere."""
        self._deltas = deltas
        self._dtype = dtypes.DTYPES[dtype].torch
        self._columns = columns
        rooted = any(isinstance(delta, Decomposed) for delta in deltas)
        self._device = torch.device("cpu" if rooted else device)

    def add(self, data: memoryview, first: int) -> None:
        """See `lora_fuse.fusion.adder.Adder`."""
        torch.set_num_threads(1)  # of this thread: its threads would spin against those of the other pieces
        rows = as_rows(data, self._dtype, self._columns)
        if self._device.type == "cpu":
            fuse_rows(rows, self._deltas, first)
            return
        if not hasattr(_of_thread, "stream"):  # one piece is carried over while another is summed
            _of_thread.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(_of_thread.stream):
            moved = rows.to(self._device, non_blocking=True)
            fuse_rows(moved, self._deltas, first)
            rows.copy_(moved, non_blocking=True)
            _of_thread.stream.synchronize()


def as_rows(data: memoryview, dtype: torch.dtype, columns: int) -> torch.Tensor:
    """Bytes as a matrix, without a copy."""
    return torch.frombuffer(data, dtype=dtype).view(-1, columns)


@contextmanager
def pinned(memories: Sequence[memoryview]) -> Iterator[None]:
    """Within it, a GPU reads and writes these itself, where it is one that can."""
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    buffers = [torch.frombuffer(memory, dtype=torch.uint8) for memory in memories]
    done = [buffer for buffer in buffers if not int(runtime.cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0))]
    try:
        yield
    finally:
        for buffer in done:
            runtime.cudaHostUnregister(buffer.data_ptr())
