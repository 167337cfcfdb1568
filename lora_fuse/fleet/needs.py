"""The CPUs, GPUs, memory and disk that a job asks of a node, under the names that Ray counts them by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lora_fuse.errors import NoDevice

DISK = "disk"  # GB that a node offers for merged checkpoints; its start command says so: Ray does not count disks
GB = 10**9
SMALLEST = 0.001  # Ray counts in steps of 0.0001
PROCESS = 2 * GB  # bytes of memory that Python and its libraries take beside the weights
ACCELERATOR = "accelerator_type:"  # how Ray names a node's kind of GPU


@dataclass(frozen=True, slots=True)
class Needs:
    """The needs of one job while it runs: threads, GPUs, bytes of weights in memory, bytes of disk."""

    cpus: int
    gpus: int
    memory: int
    disk: int

    @property
    def amounts(self) -> dict[str, float]:
        """The same by Ray's names; `memory` is in bytes, `disk` in GB."""
        disk = max(round(self.disk / GB, 3), SMALLEST)
        asked = {"CPU": float(self.cpus), "GPU": float(self.gpus), "memory": float(self.memory + PROCESS), DISK: disk}
        return {name: amount for name, amount in asked.items() if amount}

    def lacking(self, offered: Mapping[str, float]) -> list[str]:
        """The names of everything that a node which offers so much has too little of."""
        return [name for name, amount in self.amounts.items() if offered.get(name, 0) < amount]


def refuse_unmet(needs: Iterable[Needs], nodes: Sequence[Mapping[str, float]]) -> None:
    """Refuse jobs that no node could ever run, with what they ask for and what the nodes have.

    Raises:
        NoDevice: a job fits none of the nodes, each given by what it offers in all.
    """
    for one in needs:
        if any(not one.lacking(offered) for offered in nodes):
            continue
        best = min(nodes, key=lambda offered: len(one.lacking(offered)), default={})
        short = one.lacking(best)
        asked = ", ".join(_amount(name, one.amounts[name]) for name in short)
        found = "; ".join(", ".join(_amount(name, offered.get(name, 0)) for name in short) for offered in nodes)
        start = f"ray start --address=HEAD:6379 --resources='{{\"{DISK}\": GB}}'" if DISK in short else "ray start"
        raise NoDevice(
            f"no node of the cluster has {asked} for one job; the {len(nodes)} nodes have {found or 'nothing'}: start "
            f"one that offers it, `{start}`"
        )


def kinds(nodes: Iterable[Mapping[str, float]]) -> list[str]:
    """The kinds of GPU that nodes have, by name."""
    return sorted({name.removeprefix(ACCELERATOR) for offered in nodes for name in offered if ACCELERATOR in name})


def _amount(name: str, amount: float) -> str:
    if name == "memory":
        return f"{amount / GB:.3g} GB of memory"
    return f"{amount:.3g} GB of {DISK}" if name == DISK else f"{amount:g} {name}"
