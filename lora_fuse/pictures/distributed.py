"""The cases of a run spread over the processes of a launch: `accelerate launch --num_processes 8 -m stages.regress`.

Every process renders a share of the cases, on a GPU of its own, and the first one gets all of them. What goes between
them are pictures and latents, over gloo from the main memory: no collective of the GPUs is needed. accelerate is
imported only where a launcher started more than one process.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

from lora_fuse.errors import BadConfig, NoDevice, ProcessLost
from lora_fuse.machine import launch

PATIENCE = timedelta(days=1)  # for the slowest; a process that has ended is noticed at once

T = TypeVar("T")
R = TypeVar("R")


class DistributedRenderer:
    """The processes of this run; make it before torch is imported, as it chooses this process's GPU.

    `threads` are those of each process on the CPU; None leaves them to torch.

    Raises:
        BadConfig: these settings make no sense with several processes.
        NoDevice: there is no GPU for this one.
    """

    def __init__(self, placement: str, threads: int | None) -> None:
        self.here = launch.this_process()
        self._on_gpu = placement != "cpu"
        if self.here.is_alone:
            return
        if placement == "balanced":
            raise BadConfig(
                f"regress.placement balanced spreads a model over all GPUs, and {self.here.count} processes need one "
                "each: set it to cuda or model_offload, or start one process"
            )
        if not self._on_gpu and threads is None:
            raise BadConfig(
                "regress.threads is null, and a launcher gives each process other threads than one process has: "
                "set regress.threads to a number, so that the pictures do not depend on it"
            )
        if self._on_gpu:
            take_gpu(self.here.local)
        self._peers = launch.PeerWatcher()

    def __str__(self) -> str:
        """The share of this process, as the end of a sentence."""
        return "" if self.here.is_alone else f" by this process, one of {self.here.count}"

    @property
    def has_idle_cores(self) -> bool:
        """True for the process that judges, where a GPU makes the pictures."""
        return self._on_gpu and self.here.is_first

    def share(self, cases: int) -> int:
        """The most cases that a process renders of so many; the first process gets that many."""
        return -(-cases // self.here.count)

    def render(self, cases: Sequence[T], key: str, render: Callable[[Sequence[T]], list[R]]) -> list[R] | None:
        """Render this process's share of `cases`; the first process gets the results of all, in order, others None.

        `key` is that of this process's environment (`lora_fuse.pictures.environment.Key`).

        Raises:
            ProcessLost: another process has ended.
            NoDevice: two processes have the same GPU, or GPUs of different kinds.
        """
        if self.here.is_alone:
            return render(cases)
        from accelerate import PartialState
        from accelerate.utils import gather_object

        try:
            state = PartialState(cpu=True, backend="gloo", timeout=PATIENCE)
        except RuntimeError as error:
            raise ProcessLost(launch.LOST) from error
        with state.split_between_processes(list(cases)) as mine:
            share = (key, self._gpu(), render(mine) if mine else [])  # there may be more processes than cases
        try:
            shares = gather_object([share])
        except RuntimeError as error:  # gloo's word for a connection that was closed
            raise ProcessLost(launch.LOST) from error
        self._peers.part()
        state.destroy_process_group()
        check_devices([(environment, gpu) for environment, gpu, _ in shares])
        return [result for _, _, results in shares for result in results] if state.is_main_process else None

    def _gpu(self) -> str | None:
        """A name of this process's GPU that no other GPU in the world has; None on the CPU."""
        if not self._on_gpu:
            return None
        import torch

        return f"{socket.gethostname()} {torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"


def take_gpu(local: int) -> None:
    """Leave this process one of the machine's GPUs, by its number: for all libraries it is the only one, ``cuda``.

    `LOCAL_RANK`, which transformers takes for the number of a process's GPU, is 0 from now on: where that is one of
    several, the launcher's number is no GPU of this process.

    Raises:
        NoDevice: ``CUDA_VISIBLE_DEVICES`` names too few.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(number) for number in range(local + 1)] if visible is None else visible.split(",")
    if local >= len(names):
        raise NoDevice(
            f"CUDA_VISIBLE_DEVICES is {visible!r}, and process {local} of this machine needs GPU number {local} of it: "
            "start as many processes as there are GPUs"
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = names[local].strip()
    os.environ["LOCAL_RANK"] = "0"


def check_devices(found: Sequence[tuple[str, str | None]]) -> None:
    """Compare the processes' environments and GPUs (None: on the CPU).

    Raises:
        NoDevice: two have the same GPU, or they are on different kinds of machine.
    """
    keys = sorted({key for key, _ in found})
    gpus = [gpu for _, gpu in found if gpu is not None]
    if len(keys) > 1:
        raise NoDevice(f"the processes are on different kinds of machine, {' and '.join(keys)}: use one kind")
    for gpu in gpus:
        if gpus.count(gpu) > 1:
            raise NoDevice(f"{gpus.count(gpu)} processes had the same GPU, {gpu}: start as many as there are GPUs")
