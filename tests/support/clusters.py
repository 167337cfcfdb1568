"""A Ray cluster of several nodes on loopback, and jobs for it that take no time of a CPU."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from lora_fuse.errors import BadLora, NoSpace

STORE = 80 * 2**20  # bytes; the least that Ray takes is 75 MB
MEMORY = 8 * 10**9  # bytes that each node says it has
BASE = "owner/base"


def report(argument: dict[str, Any]) -> dict[str, Any]:
    """Say where this job runs, refuse, die, or wait until a file is there."""
    marks = Path(argument["marks"])
    (marks / f"{argument['name']}-{os.getpid()}").write_text(os.environ["NODE"])
    if argument.get("refuses"):
        raise BadLora("this LoRA is none")
    if argument.get("full"):
        raise NoSpace("the disk of this node is full")
    while argument.get("waits") and not (marks / argument["waits"]).exists():
        time.sleep(0.02)
    inputs = Path(argument.get("reads", ".")).exists()
    return {"node": os.environ["NODE"], "name": argument["name"], "folder": str(Path.cwd()), "inputs": inputs}


def code() -> tuple[ModuleType, ...]:
    """The code that travels to the nodes."""
    return tuple(sys.modules[name] for name in ("lora_fuse", "stages", "tests"))


def wait_on_gpu(argument: dict[str, Any]) -> str:
    """Say that this job is there, wait for so many others, and return the GPU that it sees; it sees one."""
    import torch

    marks = Path(argument["marks"])
    (marks / argument["name"]).touch()
    while len(list(marks.iterdir())) < argument["together"]:
        time.sleep(0.02)
    assert torch.cuda.device_count() == 1
    return str(torch.cuda.get_device_properties(0).uuid)


@contextmanager
def cluster(folder: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A head that runs no job, and two nodes by name, each with a Hub cache and a work folder of its own."""
    from ray.cluster_utils import Cluster

    health = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
    same = {"node_ip_address": "127.0.0.1", "object_store_memory": STORE, "include_dashboard": False}
    first = {"num_cpus": 0, "_system_config": health}
    made = Cluster(initialize_head=True, head_node_args={**same, **first})
    nodes = {}
    try:
        for name in ("a", "b"):
            env = {"NODE": name, "HF_HOME": str(folder / name / "hf"), "LORA_FUSE_WORK": str(folder / name / "work")}
            nodes[name] = made.add_node(
                **same, num_cpus=2, memory=MEMORY, resources={"disk": 5.0}, env_vars=env, wait=False
            )
        made.wait_for_nodes()
        yield made, nodes
    finally:
        made.shutdown()  # type: ignore[no-untyped-call]
