"""A Ray cluster: reached, looked at before anything is sent, given jobs, and left with nothing running.

Ray has no authentication unless a token is asked for: whoever reaches its ports runs code on every node.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from lora_fuse.errors import BadConfig, LoraFuseError, ProcessLost, require
from lora_fuse.fleet import node
from lora_fuse.fleet.jobs import Done, Job
from lora_fuse.fleet.needs import kinds, refuse_unmet
from lora_fuse.fleet.package import Package

AUTO = "auto"
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
ADDRESS = re.compile(r"(?P<host>[\w.-]+|\[[\da-fA-F:]+\]):(?P<port>\d{1,5})")
REACHED = 5.0  # seconds that a head's machine may take to accept a connection
ANSWERED = 15.0  # seconds that the head may take to answer on it; Ray itself asks for a quarter of an hour
TRIES = 3  # times that a job is run again where its node or its process died
GRACE = 20.0  # seconds in which interrupted jobs clean up before they are killed
START = "start one with `ray start --head`, docs/scale.md"


@dataclass(frozen=True, slots=True)
class Fleet:
    """A cluster that this process is connected to, and the package that its nodes have."""

    package: Package
    software: node.Software

    def __str__(self) -> str:
        import ray

        nodes = [one for one in ray.nodes() if one["Alive"]]  # type: ignore[no-untyped-call]
        gpus = sum(one["Resources"].get("GPU", 0) for one in nodes)
        return f"{len(nodes)} nodes with {gpus:g} GPUs"

    def run(self, work: Callable[[Any], Any], jobs: Sequence[Job]) -> Iterator[Done]:
        """Do jobs, and yield each as it ends; what it is refused with is its result, and the others go on.

        `work` is a function of a module of the package: it gets a job's argument in a fresh folder of the node. After
        an error or an interrupt here, no job is left running.

        Raises:
            NoDevice: a job fits no node.
            BadConfig: a node has other software, or the nodes have GPUs of several kinds.
            BadSource: a node lacks a source that is named by a whole path.
        """
        import ray

        nodes: list[dict[str, Any]] = [one for one in ray.nodes() if one["Alive"]]  # type: ignore[no-untyped-call]
        refuse_unmet((job.needs for job in jobs), [one["Resources"] for one in nodes])
        able = [one for one in nodes if any(not job.needs.lacking(one["Resources"]) for job in jobs)]
        if any(job.needs.gpus for job in jobs) and len(found := kinds(one["Resources"] for one in able)) > 1:
            raise BadConfig(
                f"the nodes have GPUs of different kinds, {' and '.join(found)}, and their pictures are not compared: "
                "take nodes of one kind"
            )
        holders = self._look(able, jobs)
        waiting = {self._submit(work, job, holders): job for job in jobs}
        try:
            while waiting:
                (ended, *_), _ = ray.wait(list(waiting), num_returns=1)
                yield _done(ended, waiting.pop(ended))
        finally:
            _cancel(list(waiting))

    def _look(self, able: Sequence[Mapping[str, Any]], jobs: Sequence[Job]) -> dict[str, Iterator[str]]:
        """Look at each node that may run a job; returns, by base, the ids of those that hold it, again and again."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        bases = sorted({job.base for job in jobs if job.base})
        look = ray.remote(node.look)
        asked = {}
        for one in able:
            here = NodeAffinitySchedulingStrategy(one["NodeID"], soft=False)
            place = look.options(num_cpus=0, scheduling_strategy=here)
            asked[one["NodeID"]] = place.remote(self.package.absolute, bases)
        holding: dict[str, list[str]] = {base: [] for base in bases}
        for name, answer in asked.items():
            facts = _answer(answer)
            if facts is None:  # it died meanwhile
                continue
            self.software.refuse_other(facts.software, facts.host)
            node.refuse_lacking(facts)
            for base in facts.holds:
                holding[base].append(name)
        return {base: cycle(names) for base, names in holding.items() if names}

    def _submit(self, work: Callable[[Any], Any], job: Job, holders: Mapping[str, Iterator[str]]) -> Any:
        """Hand a job to Ray: to a node that holds its base while one of those is free, else to any."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        amounts = job.needs.amounts
        options: dict[str, Any] = {
            "name": job.label,
            "num_cpus": amounts.pop("CPU", 0),
            "num_gpus": amounts.pop("GPU", 0),
            "memory": amounts.pop("memory", 0),
            "resources": amounts,
            "max_retries": TRIES,
            "scheduling_strategy": "SPREAD",
        }
        if job.base is not None and job.base in holders:
            near = next(holders[job.base])
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(near, soft=True, _spill_on_unavailable=True)
        return ray.remote(node.do_job).options(**options).remote(work, job.argument, self.software)


def _answer(asked: Any) -> node.NodeFacts | None:
    import ray

    try:
        facts: node.NodeFacts = ray.get(asked)
    except (ray.exceptions.NodeDiedError, ray.exceptions.WorkerCrashedError, ray.exceptions.TaskUnschedulableError):
        return None
    except ray.exceptions.RayError as error:
        raise BadConfig(f"a node of the cluster cannot start: {_first_line(error)}") from error
    return facts


def _done(ended: Any, job: Job) -> Done:
    import ray

    try:
        host, result = ray.get(ended)
    except ray.exceptions.RayError as error:
        lost = ProcessLost(f"its process or node died {1 + TRIES} times: {_first_line(error)}")
        return Done(job, "no node", error=lost)
    if isinstance(result, LoraFuseError):
        return Done(job, host, error=result)
    return Done(job, host, result)


def _first_line(error: Exception) -> str:
    """The first line of Ray's message that says something; the rest is advice for its own developers."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _cancel(refs: list[Any]) -> None:
    """Interrupt what runs, so that it removes its folder, and kill what does not end by itself."""
    import ray

    if not refs or not ray.is_initialized():
        return
    for force in (False, True):
        for ref in refs:
            with suppress(ray.exceptions.RayError, ValueError, TypeError):
                ray.cancel(ref, force=force)
        _, refs = ray.wait(refs, num_returns=len(refs), timeout=GRACE)
        if not refs:
            return


@contextmanager
def connected(address: str, package: Package) -> Iterator[Fleet]:
    """Connect to the cluster whose head is at ``HOST:PORT``, or with `AUTO` to that of which this machine is a node.

    Raises:
        MissingExtra: Ray is not installed.
        BadConfig: there is no cluster, or it is none that this process can use.
    """
    require("ray", "--ray")
    address = os.environ.get("RAY_ADDRESS", address) if address == AUTO else address
    if address != AUTO:
        _reach(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    _ask(address)
    with tempfile.TemporaryDirectory(prefix="lora-fuse-") as folder:
        travels = Path(folder) / "package.zip"
        package.write(travels)
        with _our_signals():
            try:
                ray.init(
                    address,
                    runtime_env={"working_dir": str(travels)},
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    configure_logging=False,
                )
            except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
                raise _none_at(address, _first_line(error)) from error
        try:
            yield Fleet(package, node.Software.here())
        finally:
            ray.shutdown()


def _reach(address: str) -> None:
    named = ADDRESS.fullmatch(address)
    if named is None or not 0 < int(named["port"]) < 1 << 16:
        raise BadConfig(f"--ray takes HOST:PORT, or nothing for the cluster of this machine; got {address}")
    try:
        socket.create_connection((named["host"].strip("[]"), int(named["port"])), REACHED).close()
    except OSError as error:
        raise BadConfig(f"there is no Ray cluster at {address} ({error.strerror or error}); {START}") from error


def _ask(address: str) -> None:
    """Let Ray's own command ask the head how it is, in another process, which can be ended when it waits too long."""
    at = [] if address == AUTO else ["--address", address]
    command = [sys.executable, "-m", "ray.scripts.scripts", "status", *at]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWERED, check=False)
    except subprocess.TimeoutExpired as error:
        raise _none_at(address, f"no head answers within {ANSWERED:g} s{_elsewhere(address)}") from error
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"`ray status` ends with {done.returncode}"]
        raise _none_at(address, said[-1].partition("Error: ")[2] or said[-1])


def _elsewhere(address: str) -> str:
    """Name the address that Ray asks instead of one of the loopback, this machine's own, as the end of a sentence."""
    host, _, port = address.rpartition(":")
    if host not in LOOPBACK:
        return ""
    import ray

    own: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    given = f"start it with `ray start --head --node-ip-address={own}`"
    return "" if own in LOOPBACK else f", as Ray takes {host} for this machine's own address: at {own}:{port}; {given}"


def _none_at(address: str, why: str) -> BadConfig:
    where = "on this machine" if address == AUTO else f"at {address}"
    return BadConfig(f"there is no Ray cluster {where} to work with: {why.rstrip('.')}; {START}")


@contextmanager
def _our_signals() -> Iterator[None]:
    """Keep the handlers of SIGTERM and SIGINT: Ray puts its own in their place when it connects."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
